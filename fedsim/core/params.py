"""Parameters as dicts of tensors, and their one flat buffer.

`Params` maps names to tensors. A `Layout` lays them end to end in one vector, so that a set of parameters is moved,
shared, stored or summed by one operation, and is read by name through views that cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Params = dict[str, Tensor]
Message = dict[str, Params]
"""Message group -> tensors."""
FOLD = "fold/"  # begins the names of a server's state that is added to the frozen base
LARGE = 1 << 28  # bytes of parameters from which on no process keeps a partial sum of its own
ALIGN = 4096  # tensors are cut at multiples of this many elements: a whole number of the blocks that codecs work on


@dataclass(frozen=True)
class Chunk:
    """A stretch of a layout's flat vector: whole tensors, or pieces of large ones as vectors.

    Attributes:
        start, stop: where it lies in the flat vector.
        shapes: name -> shape; a piece of a tensor is `[n]`.
    """

    start: int
    stop: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def span(self) -> slice:
        """Its place in the flat vector."""
        return slice(self.start, self.stop)

    def views(self, flat: Tensor) -> Params:
        """Name -> view of the chunk's own stretch, `[stop - start]` or, for K lanes, `[K, stop - start]`."""
        out, start = {}, 0
        for name, shape in self.shapes.items():
            size = torch.Size(shape).numel()
            part = flat.narrow(-1, start, size)
            out[name] = part.unflatten(-1, shape) if shape else part[..., 0]
            start += size
        return out


@dataclass(frozen=True)
class Layout:
    """Names and shapes of parameters, in the order in which they lie in a flat vector.

    Attributes:
        shapes: name -> shape.
        dtype: of every tensor.
    """

    shapes: dict[str, tuple[int, ...]]
    dtype: torch.dtype

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> Layout:
        """The layout of these tensors.

        Raises:
            ValueError: if their dtypes differ: one flat vector has one.
        """
        dtypes = {t.dtype for t in params.values()}
        if len(dtypes) > 1:
            raise ValueError(f"one layout holds one dtype, got {sorted(map(str, dtypes))}")
        return cls({n: tuple(t.shape) for n, t in params.items()}, dtypes.pop() if dtypes else torch.float32)

    @property
    def numel(self) -> int:
        """Elements in all."""
        return sum(torch.Size(s).numel() for s in self.shapes.values())

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.numel * self.dtype.itemsize

    @property
    def sums(self) -> Layout:
        """The same in the type of sums, of the global parameters and of kept state: float32, or float64 under float64."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self if dtype == self.dtype else Layout(self.shapes, dtype)

    def empty(self, device: torch.device | str = "cpu") -> Tensor:
        """A zeroed flat vector, `[numel]`."""
        return torch.zeros(self.numel, dtype=self.dtype, device=device)

    def views(self, flat: Tensor) -> Params:
        """Name -> view of `flat` (`[numel]`) with the name's shape; writing to a view writes to `flat`.

        Raises:
            ValueError: if `flat` has another length.
        """
        if flat.numel() != self.numel:
            raise ValueError(f"the layout has {self.numel} elements, the vector {flat.numel()}")
        out, start = {}, 0
        for name, shape in self.shapes.items():
            size = torch.Size(shape).numel()
            out[name] = flat[start : start + size].view(shape)
            start += size
        return out

    def lanes(self, flat: Tensor) -> Params:
        """Name -> view of `flat` (`[K, numel]`) with the shape `[K, ...]`; writing to a view writes to `flat`.

        Raises:
            ValueError: if a row of `flat` has another length.
        """
        if flat.dim() != 2 or flat.shape[1] != self.numel:
            raise ValueError(f"the layout has {self.numel} elements, the lanes are {tuple(flat.shape)}")
        out, start = {}, 0
        for name, shape in self.shapes.items():
            size = torch.Size(shape).numel()
            part = flat[:, start : start + size]
            out[name] = part.unflatten(1, shape) if shape else part[:, 0]
            start += size
        return out

    def chunks(self, most: int | None = None) -> list[Chunk]:
        """Stretches of at most `most` elements (`ALIGN` at least), in order; None = one that holds everything.

        Tensors are cut at multiples of `ALIGN` elements of their own, so what is worked out block by block does not depend
        on `most`.
        """
        if most is None:
            return [Chunk(0, self.numel, dict(self.shapes))]
        most = max(ALIGN, most // ALIGN * ALIGN)
        out: list[Chunk] = []
        start, at, held = 0, 0, {}
        for name, shape in self.shapes.items():
            size = torch.Size(shape).numel()
            pieces = [shape] if size <= most else [(min(most, size - i),) for i in range(0, size, most)]
            for piece in pieces:
                n = torch.Size(piece).numel()
                if held and at - start + n > most:
                    out.append(Chunk(start, at, held))
                    start, held = at, {}
                held[name] = piece
                at += n
        return [*out, Chunk(start, at, held)]

    def fill(self, flat: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Copy `params` into `flat` (`[numel]`), casting to the layout's dtype; returns `flat`.

        Raises:
            KeyError: if a name is missing.
        """
        for name, view in self.views(flat).items():
            view.copy_(params[name])
        return flat


def clone(a: Params) -> Params:
    """A copy that shares no memory with `a`."""
    return {n: t.detach().clone() for n, t in a.items()}


def meta(layout: Layout) -> Params:
    """Tensors of these names and shapes that hold nothing."""
    return layout.views(torch.empty(layout.numel, dtype=layout.dtype, device="meta"))
