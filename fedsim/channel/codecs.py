"""What travels between server and clients: a tensor as 32, 16, 8 or 4 bits a value, and its bytes by arithmetic.

Training and merging stay in full precision; a codec says which numbers arrive at the other end. `round_trip` gives them
without making the message, `nbytes` counts what the message would take.

- `fp32`, `fp16`, `bf16`: a cast. What is beyond the type's range becomes infinite, as a cast does anywhere: a clipped
  weight would look like a weight, an infinite one is seen by whoever looks for it.
- `blockwise8`: blocks of 4096 values, each scaled by its element of largest magnitude, then the nearest of the 256
  levels of the dynamic tree type. Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022, sections 1.3
  and 2.1.
- `nf4`: blocks of 64 values, each scaled by its absolute maximum, then the nearest of the 16 levels of NormalFloat; two
  codes to a byte. Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, section 3 and appendix E.

A message of the two blockwise types carries a float32 scale a block and, once a tensor, the table of levels (1,024 or 64
bytes), as published sizes count it. A block that holds a NaN or an infinity arrives as NaN.

Deviation: the scale of a block of `blockwise8` has the sign of the element it comes from. The paper's levels reach +1
but not -1, so by the plain maximum a block whose largest element is negative would shrink by 0.7 % at every exchange.
With the sign the largest element arrives as it is, and what has been sent once can be sent again unchanged. Bytes and
the bound on the error are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fedsim.channel.base import Senders, Sizes, Stage
from fedsim.core.errors import UserError
from fedsim.core.params import ALIGN, Message, Params

_ALIASES = {
    "fp32": ("float32", "float", "single"),
    "fp16": ("float16", "half"),
    "bf16": ("bfloat16",),
    "blockwise8": ("8bit", "8-bit", "int8"),
    "nf4": ("4bit", "4-bit", "float4", "normfloat4"),
}
_NAMES = {alias: name for name, aliases in _ALIASES.items() for alias in (name, *aliases)}
_CASTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Elements that are worked on at once, over all lanes: on the CPU what stays in a core's cache, else enough for a kernel.
_AT_ONCE_CPU, _AT_ONCE = 1 << 16, 1 << 21


def _dynamic_tree() -> tuple[float, ...]:
    """The 256 levels of the signed dynamic tree type, in [-1, 1] and ascending.

    After the sign bit, z zero bits give the decimal exponent -z and a one bit ends them; the other 6 - z bits
    cut [0.1, 1] x 10^-z into 2^(6-z) equal intervals, whose midpoints are the levels. Of the two patterns without a one
    bit, one is 0 and one is 1.
    """
    positive = [10.0**-z * (0.1 + 0.9 * (i + 0.5) / 2 ** (6 - z)) for z in range(7) for i in range(2 ** (6 - z))]
    return tuple(sorted([*positive, *(-p for p in positive), 0.0, 1.0]))


# QLoRA, appendix E.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class _Code:
    """A blockwise type: elements a block, bits a value, whether a scale has a sign, levels in [-1, 1], ascending."""

    block: int
    bits: int
    signed: bool
    levels: tuple[float, ...]

    @property
    def table(self) -> int:
        """Bytes of the levels in float32."""
        return 4 * len(self.levels)


_CODES = {"blockwise8": _Code(4096, 8, True, _dynamic_tree()), "nf4": _Code(64, 4, False, _NF4)}


def canonical(name: str) -> str:
    """The codec's name: `fp32`, `fp16`, `bf16`, `blockwise8` or `nf4`, for itself and for other spellings.

    Raises:
        UserError: (a ValueError) for any other name; lists these and their spellings.
    """
    found = _NAMES.get(str(name).strip().lower())
    if found is None:
        known = ", ".join(f"{n} ({', '.join(aliases)})" for n, aliases in _ALIASES.items())
        raise UserError(f"no message type is called {name!r}; known: {known}")
    return found


def codec(name: str | None) -> Codec:
    """The codec of this name or spelling; None: what is trained travels as it is, in its own type.

    Raises:
        UserError: as `canonical`.
    """
    if name is None:
        return Codec("native", None)
    found = canonical(name)
    return Codec(found, _CASTS[found]) if found in _CASTS else _Blockwise(found)


class Codec(Stage):
    """What tensors are once they have travelled, on any device; the base class casts. As a stage it codes each tensor by itself, in both directions.

    Tensors are `[..., n]` and floating-point. The leading axes are lanes: each is coded as if it were alone, to the same
    bits. Blocks run along the last axis and never cross tensors: the caller passes one tensor, or a piece of it that
    begins at a multiple of `ALIGN`.

    Attributes:
        name: canonical name; "native" for tensors as they are.
    """

    def __init__(self, name: str, dtype: torch.dtype | None) -> None:
        self.name, self._dtype = name, dtype

    def up(self, message: Message, c: Senders, state: Message) -> tuple[Message, Message]:
        """The messages as they arrive, coded client by client and tensor by tensor."""
        return {
            group: {n: self.round_trip(u.reshape(len(u), -1)).view(u.shape) for n, u in tensors.items()}
            for group, tensors in message.items()
        }, state

    def down(self, params: Params) -> Params:
        """Parameters as they arrive, coded tensor by tensor."""
        return {n: self.round_trip(t.reshape(-1)).view(t.shape) for n, t in params.items()}

    @torch.no_grad()
    def round_trip(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """What arrives of `x`, in its type.

        Beside the result it takes at most 22 bytes for each of 65,536 elements at a time on the CPU (1.4 MB), of 2,097,152
        elsewhere (46 MB); with more lanes than 16, or 512, for each of 4,096 a lane.

        Args:
            x: `[..., n]`.
            out: where to put it, same shape, may be `x` itself; None for a new tensor. `x` itself comes back where the
                message's type holds every value of the type of `x`.
        """
        _check(x)
        if self._dtype is None or torch.promote_types(x.dtype, self._dtype) == self._dtype:
            return x if out is None else out.copy_(x)
        lanes, result, into = _lanes(x, out)
        for start, stop, _ in _parts(lanes, ALIGN):
            into[:, start:stop].copy_(lanes[:, start:stop].to(self._dtype))
        return result

    def nbytes(self, shapes: Iterable[tuple[int, ...] | int], dtype: torch.dtype) -> Sizes:
        """Bytes of one message of tensors of these shapes, or numbers of elements, whose own type is `dtype`.

        A tensor that two parameters share is to be named once.
        """
        width = (dtype if self._dtype is None else self._dtype).itemsize
        return Sizes(width * sum(_numels(shapes)))


class _Blockwise(Codec):
    """`blockwise8` and `nf4`: a code a value, a scale a block."""

    def __init__(self, name: str) -> None:
        super().__init__(name, None)
        self._code = _CODES[name]

    @torch.no_grad()
    def round_trip(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """As `Codec.round_trip`; always a new tensor, or `out`."""
        _check(x)
        lanes, result, into = _lanes(x, out)
        for start, stop, block in _parts(lanes, self._code.block):
            codes, scale, spare = self._quantize(_blocks(lanes[:, start:stop], block))
            _blocks(into[:, start:stop], block).copy_(self._dequantize(codes, scale, spare))
        return result

    def nbytes(self, shapes: Iterable[tuple[int, ...] | int], dtype: torch.dtype) -> Sizes:
        """Bytes of one message of tensors of these shapes or numbers of elements, whatever their own type."""
        code, numels = self._code, _numels(shapes)
        scales = sum(4 * -(-n // code.block) + code.table for n in numels)
        return Sizes(sum(-(-n * code.bits // 8) for n in numels), scales)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nearest levels of `x` `[K, blocks, block]`.

        Returns:
            Codes, int32 like `x`; scales, `[K, blocks]`; float32 memory like `x` that is free again.
        """
        _, bounds, lowest = _tables(self.name, x.device)
        x = x.float()
        top, bottom = x.amax(-1), x.amin(-1)
        scale = torch.where(top >= -bottom, top, bottom)
        if not self._code.signed:
            scale.abs_()
        scale.masked_fill_(~scale.isfinite(), math.nan)
        ratio = (x / scale.masked_fill(scale == 0, 1.0).unsqueeze(-1)).contiguous()
        # The upper 16 bits of the ratio say to within one level where it lies, one comparison says the rest: 10 times
        # faster than a binary search. Division, not a product with 1 / scale, which overflows for the smallest scales.
        key = (ratio.view(torch.int32) >> 16).add_(1 << 15).view(-1)
        codes = lowest.index_select(0, key)
        bound = torch.index_select(bounds, 0, codes, out=key.view(torch.float32))
        codes += ratio.view(-1) > bound
        return codes.view(ratio.shape), scale, ratio

    def _dequantize(self, codes: Tensor, scale: Tensor, spare: Tensor) -> Tensor:
        """Level x scale for codes `[K, blocks, block]` and scales `[K, blocks]`, in the memory of `spare`."""
        levels = _tables(self.name, codes.device)[0]
        found = torch.index_select(levels, 0, codes.view(-1), out=spare.view(-1)).view(codes.shape)
        return found.mul_(scale.unsqueeze(-1)).add_(0.0)  # zero x a negative scale is -0, and + 0 makes it 0


@cache
def _tables(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For finding nearest levels: `(levels [L], bounds [L], lowest [65536])`.

    `bounds[c]` is halfway between levels c and c + 1, infinite for the last; a value on it belongs to level c.
    `lowest[k]` is the code of the smallest float32 whose upper 16 bits, as a signed integer, are k - 32768; levels lie so
    far apart that of all floats with these bits the codes are `lowest[k]` or one more.
    """
    with torch.inference_mode(False):  # the tables outlive the caller's mode
        levels = torch.tensor(_CODES[name].levels, dtype=torch.float64, device="cpu")
        halfway = ((levels[:-1] + levels[1:]) / 2).float()
        key = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32, device="cpu")
        # The smallest negative float of these upper bits has all lower ones set, the smallest positive one none.
        bits = (key << 16) | (key < 0).int().mul_(0xFFFF)
        smallest = bits.view(torch.float32).nan_to_num(0.0).clamp(-1.0, 1.0)
        lowest = torch.bucketize(smallest, halfway, out_int32=True)
        bounds = torch.cat([halfway, halfway.new_full((1,), math.inf)])
        return levels.float().to(device), bounds.to(device), lowest.to(device)


def _check(x: Tensor) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise TypeError(f"a message is made of floating-point tensors [..., n], got {x.dtype} {tuple(x.shape)}")


def _numels(shapes: Iterable[tuple[int, ...] | int]) -> list[int]:
    return [s if isinstance(s, int) else math.prod(s) for s in shapes]


def _lanes(x: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`x` as `[K, n]`, the result in the shape of `x`, and the result as `[K, n]`."""
    if out is not None and out.shape != x.shape:
        raise ValueError(f"the result has shape {tuple(x.shape)}, out {tuple(out.shape)}")
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    shape = (math.prod(x.shape[:-1]), x.shape[-1])
    return x.reshape(shape), result, result.view(shape)


def _parts(lanes: Tensor, block: int) -> Iterator[tuple[int, int, int]]:
    """Stretches of the last axis of `lanes` `[K, n]` as `(start, stop, elements a block)`; a short last block by itself."""
    k, n = lanes.shape
    step = max((_AT_ONCE_CPU if lanes.device.type == "cpu" else _AT_ONCE) // max(k, 1) // ALIGN, 1) * ALIGN
    whole = n - n % block
    for start in range(0, whole, step):
        yield start, min(start + step, whole), block
    if whole < n:
        yield whole, n, n - whole


def _blocks(lanes: Tensor, block: int) -> Tensor:
    """`[K, m]` as `[K, m / block, block]`, a view."""
    out: Tensor = lanes.unflatten(1, (lanes.shape[1] // block, block))
    return out
