"""Codecs: levels derived anew from their papers, nearest by looking at all of them, the same bits in lanes and pieces, and bytes by hand."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import pytest
import torch
from tiers import fast_only
from torch import Tensor

from fedsim.channel import codecs as messages
from fedsim.channel.base import Sizes
from fedsim.channel.codecs import ALIGN, canonical, codec
from fedsim.core.errors import UserError

BLOCKWISE = ["blockwise8", "nf4"]
CODECS = [None, "fp32", "fp16", "bf16", *BLOCKWISE]
BLOCK = {"blockwise8": 4096, "nf4": 64}
# Halves of the widest gaps: the coarsest step of the dynamic tree is 0.9 / 2 (its smallest exponents have few levels, but
# these are small), in [0.1, 1] it is 0.9 / 64; NormalFloat's is between its two lowest levels.
HALF_GAP = {"blockwise8": 0.9 / 64 / 2, "nf4": (1 - 0.6961928009986877) / 2}
SIZES = [1, 2, 63, 64, 65, 4095, 4096, 4097, 3 * 4096 + 129]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits(x: Tensor) -> Tensor:
    """The bytes of a tensor: NaN is equal to itself, 0 is not -0."""
    return x.contiguous().view(torch.uint8)


def dynamic_tree() -> list[float]:
    """The 256 numbers, bit pattern by bit pattern: sign, zeros that count the decimal exponent, a one, a linear rest."""
    out = []
    for pattern in range(256):
        text = f"{pattern:08b}"
        sign, rest = (-1 if text[0] == "1" else 1), text[1:]
        if "1" not in rest:
            out.append(0.0 if sign > 0 else 1.0)
            continue
        zeros = rest.index("1")
        linear = rest[zeros + 1 :]
        step = 0.9 / 2 ** len(linear)
        middle = 0.1 + step * (int(linear or "0", 2) + 0.5)
        out.append(sign * middle * 10.0**-zeros)
    return sorted(out)


def normal_float() -> list[float]:
    """QLoRA's levels: quantiles of the normal distribution, evenly spaced in probability, 8 above zero, 7 below, and zero.

    The outermost probability is the mean of those that 30 and 32 halves of bins leave: (1 - 1/30 + 1 - 1/32) / 2.
    """
    end, quantile = (29 / 30 + 31 / 32) / 2, NormalDist().inv_cdf
    above = [quantile(end + (0.5 - end) * i / 8) for i in range(8)]
    below = [-quantile(end + (0.5 - end) * i / 7) for i in range(7)]
    return sorted(level / above[0] for level in [*above, *below, 0.0])


LEVELS = {"blockwise8": dynamic_tree(), "nf4": normal_float()}


def slow(name: str, x: Tensor) -> list[float]:
    """What arrives of one lane, block by block, by comparing with every level in float64: obviously right."""
    levels = torch.tensor(messages._CODES[name].levels, dtype=torch.float64)
    values = []
    for block in x.double().split(BLOCK[name]):
        scale = block[block.abs().argmax()]
        if name == "nf4":
            scale = scale.abs()
        values += (levels[(block[:, None] / scale - levels).abs().argmin(1)] * scale).tolist()
    return values


# --- names


def test_every_spelling_leads_to_its_codec() -> None:
    spellings = {
        "fp32": ["fp32", "float32", "FP32"],
        "fp16": ["fp16", "float16", "half"],
        "bf16": ["bf16", "bfloat16", " bf16 "],
        "blockwise8": ["blockwise8", "8bit", "int8"],
        "nf4": ["nf4", "4bit", "float4", "NF4"],
    }
    for name, others in spellings.items():
        for other in others:
            assert canonical(other) == name
            assert codec(other).name == name


@fast_only(0, 1)
@pytest.mark.parametrize("name", ["fp8", "", "fp4", "none"])
def test_an_unknown_type_is_refused_with_the_list(name: str) -> None:
    with pytest.raises(UserError) as error:
        canonical(name)
    text = str(error.value)
    assert repr(name) in text and "\n" not in text
    for known in ("fp32", "fp16", "bf16", "blockwise8", "nf4", "half", "8bit", "4bit"):
        assert known in text
    with pytest.raises(ValueError, match="no message type"):
        codec(name)


# --- levels


def test_the_256_levels_are_those_of_the_bit_patterns() -> None:
    levels = messages._CODES["blockwise8"].levels
    assert len(levels) == len(set(levels)) == 256
    assert levels == pytest.approx(LEVELS["blockwise8"], rel=1e-14)
    assert levels[-2:] == pytest.approx([0.1 + 0.9 * 127 / 128, 1.0]) and levels[0] == -levels[-2]  # by hand
    assert [x for x in levels if 0 < x < 1e-5] == pytest.approx([0.55e-6, 3.25e-6, 7.75e-6])
    assert max(b - a for a, b in itertools.pairwise(levels)) / 2 == pytest.approx(HALF_GAP["blockwise8"])


def test_the_16_levels_are_the_quantiles_of_the_normal_distribution() -> None:
    levels = messages._CODES["nf4"].levels
    assert len(levels) == 16 and list(levels) == sorted(levels)
    assert levels == pytest.approx(LEVELS["nf4"], abs=1e-6)
    assert {levels[0], levels[7], levels[-1]} == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize("name", BLOCKWISE)
def test_the_nearest_level_is_found_on_both_sides_of_every_halfway_point(name: str) -> None:
    levels = torch.tensor(messages._CODES[name].levels, dtype=torch.float64)
    halfway = ((levels[1:] + levels[:-1]) / 2).float()
    ends = torch.tensor([math.inf, -math.inf])
    near = [halfway, *(torch.nextafter(halfway, end) for end in ends), levels.float(), normal(2048).clamp(-1, 1)]
    block = BLOCK[name] - 1
    parts = torch.cat(near).split(block)
    for part in parts:
        x = torch.cat([torch.ones(1), part])  # its scale is 1, and division by it changes nothing
        arrived = codec(name).round_trip(x)
        codes = torch.searchsorted(levels.float(), arrived)
        assert torch.equal(levels.float()[codes], arrived), "each value is a level"
        assert torch.equal(codes, (x[:, None] > halfway).sum(1)), "the code is the number of halfway points below"
        distance = (x.double()[:, None] - levels).abs()
        chosen = distance.gather(1, codes[:, None])[:, 0]
        assert (chosen <= distance.min(1).values + 2.0**-23 * x.abs()).all(), "halfway is known to a float32's rounding"


@fast_only(4, 8)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", BLOCKWISE)
def test_values_are_those_of_the_slow_way(name: str, n: int) -> None:
    x = normal(n, seed=n) * 0.02
    torch.testing.assert_close(codec(name).round_trip(x), torch.tensor(slow(name, x)), rtol=1e-6, atol=0)


# --- what arrives


@fast_only(0, 2)
@pytest.mark.parametrize("factor", [1.0, -1.0, 3e-41, 1e-30, 2e38 / 5])
@pytest.mark.parametrize("name", BLOCKWISE)
def test_the_error_is_at_most_half_the_widest_gap(name: str, factor: float) -> None:
    x = normal(5 * 4096 + 77) * factor
    y = codec(name).round_trip(x)
    for block, got in zip(x.double().split(BLOCK[name]), y.double().split(BLOCK[name]), strict=True):
        most = block.abs().max()
        assert (block - got).abs().max() <= HALF_GAP[name] * most * (1 + 1e-6) + 2.0**-149
        assert got[block.abs().argmax()] == block[block.abs().argmax()], "the largest element arrives as it is"


@fast_only(0, 1)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CODECS)
def test_what_was_sent_once_is_sent_again_unchanged(name: str | None, dtype: torch.dtype) -> None:
    once = codec(name)
    for factor in (1.0, -0.02, 1e-4, 1e-7, 1e-42):
        x = (normal(3 * 4096 + 5, seed=1) * factor).to(dtype)
        y = once.round_trip(x)
        assert y.dtype == dtype and y.shape == x.shape
        assert torch.equal(bits(once.round_trip(y)), bits(y))


@fast_only(0, 1)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", CODECS)
def test_the_result_lies_where_it_is_to(name: str | None, dtype: torch.dtype) -> None:
    x = normal(3, 4096 + 33).to(dtype)
    one = codec(name)
    expected = one.round_trip(x).clone()
    assert expected.dtype == dtype and expected.shape == x.shape
    out = torch.empty_like(x)
    assert one.round_trip(x, out=out) is out
    assert torch.equal(bits(out), bits(expected))
    before = x.clone()
    assert one.round_trip(x, out=x) is x
    assert torch.equal(bits(x), bits(expected))
    if name in BLOCKWISE:
        assert not torch.equal(x, before)


@pytest.mark.parametrize("name", BLOCKWISE)
def test_multiples_of_the_levels_arrive_exactly(name: str) -> None:
    levels = torch.tensor(messages._CODES[name].levels).repeat(20)
    for scale in (1.0, 2.0**-100, *([-0.5] if name == "blockwise8" else [])):  # NormalFloat's levels are not symmetric
        x = levels * scale
        assert torch.equal(codec(name).round_trip(x), x)


@pytest.mark.parametrize("name", BLOCKWISE)
def test_zeros_stay_zeros_and_none_becomes_minus_zero(name: str) -> None:
    x = torch.zeros(3 * 4096)
    x[4096] = -7.0
    y = codec(name).round_trip(x)
    assert torch.equal(bits(y), bits(x))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", BLOCKWISE)
def test_a_block_that_is_not_finite_arrives_as_nan_and_no_other(name: str, bad: float) -> None:
    block = BLOCK[name]
    x = normal(4 * block + 10)
    clean = codec(name).round_trip(x)
    for where, start, stop in ((block + 3, block, 2 * block), (4 * block + 9, 4 * block, 4 * block + 10)):
        sick = x.clone()
        sick[where] = bad
        y = codec(name).round_trip(sick)
        assert y[start:stop].isnan().all()
        assert torch.equal(y[:start], clean[:start])
        assert torch.equal(y[stop:], clean[stop:])
    beyond = torch.full((4,), 1e39, dtype=torch.float64)  # not a float32, in which scales travel
    assert codec(name).round_trip(beyond).isnan().all()


def test_casts_round_as_the_types_do_and_what_is_beyond_them_is_infinite() -> None:
    x = torch.tensor([65504.0, 65519.0, 65520.0, -1e6, 1e-8, 1 + 2.0**-11, math.nan, math.inf])
    expected = torch.tensor([65504.0, 65504.0, math.inf, -math.inf, 0.0, 1.0, math.nan, math.inf])
    torch.testing.assert_close(codec("fp16").round_trip(x), expected, rtol=0, atol=0, equal_nan=True)
    x = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1e38, math.nan, -math.inf])
    expected = torch.tensor([1.0, 1 + 2.0**-6, 1e38, math.nan, -math.inf])
    got = codec("bf16").round_trip(x)
    torch.testing.assert_close(got, expected, rtol=2.0**-8, atol=0, equal_nan=True)
    assert got[:2].tolist() == expected[:2].tolist()
    x = torch.tensor([1 + 2.0**-30, 1e39, 2.0**-20], dtype=torch.float64)
    assert codec("fp32").round_trip(x).tolist() == [1.0, math.inf, 2.0**-20]


def test_what_loses_nothing_comes_back_itself() -> None:
    for dtype in FLOATS:
        x = normal(10).to(dtype)
        assert codec(None).round_trip(x) is x
        assert (codec("fp32").round_trip(x) is x) == (dtype != torch.float64)
        assert (codec("fp16").round_trip(x) is x) == (dtype == torch.float16)
        assert (codec("bf16").round_trip(x) is x) == (dtype == torch.bfloat16)


# --- lanes and pieces


@fast_only(0, 8)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", CODECS)
def test_lanes_have_the_bits_of_one_by_one(name: str | None, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "_AT_ONCE_CPU", 2 * ALIGN)
    one, wide = codec(name), normal(6, n + 9, seed=n)
    x = wide[:, 4 : 4 + n].view(2, 3, n)  # a piece of wider lanes, as in a [K, N] buffer
    arrived = one.round_trip(x)
    assert arrived.shape == x.shape
    for i in range(2):
        for j in range(3):
            assert torch.equal(bits(arrived[i, j]), bits(one.round_trip(x[i, j].clone())))


@fast_only(2)
@pytest.mark.parametrize("cuts", [[1], [2], [1, 2, 3], [3]])
@pytest.mark.parametrize("name", CODECS)
def test_pieces_cut_at_multiples_of_align_are_the_whole(name: str | None, cuts: list[int]) -> None:
    n = 3 * ALIGN + 1235
    one, x = codec(name), normal(2, n)
    edges = [0, *(c * ALIGN for c in cuts), n]
    pieces = [x[:, a:b] for a, b in itertools.pairwise(edges)]
    assert torch.equal(bits(torch.cat([one.round_trip(p) for p in pieces], dim=1)), bits(one.round_trip(x)))


@pytest.mark.parametrize("name", ["fp16", *BLOCKWISE])
def test_bits_do_not_depend_on_how_much_is_worked_on_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, one = normal(20 * ALIGN + 77), codec(name)
    arrived = one.round_trip(x)
    monkeypatch.setattr(messages, "_AT_ONCE_CPU", 3 * ALIGN)
    assert torch.equal(bits(one.round_trip(x)), bits(arrived))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("name", CODECS)
def test_a_gpu_gives_the_bits_of_the_cpu(name: str | None) -> None:
    one, x = codec(name), normal(3, 5 * ALIGN + 77)
    assert torch.equal(bits(one.round_trip(x.cuda()).cpu()), bits(one.round_trip(x)))


# --- bytes


def gpt_neo_untied() -> list[tuple[int, ...]]:
    """The 317 parameters of gpt-neo-1.3B with a head of its own: 1,418,502,144 elements.

    24 layers of width 2048, feed-forward 8192, 50,257 tokens, 2048 positions; the projections of queries, keys and values
    have no bias. The hub's model has 1,315,575,808: its head is the token embedding, 50,257 x 2048 fewer.
    """
    h, f, v, positions = 2048, 8192, 50257, 2048
    norm = [(h,), (h,)]
    layer = [*norm, (h, h), (h, h), (h, h), (h, h), (h,), *norm, (f, h), (f,), (h, f), (h,)]
    return [(v, h), (positions, h), *layer * 24, *norm, (v, h)]


def test_1418_million_parameters_take_the_published_mebibytes() -> None:
    shapes = gpt_neo_untied()
    assert len(shapes) == 317 and sum(map(math.prod, shapes)) == 1_418_502_144
    assert sum(map(math.prod, shapes[:-1])) == 1_315_575_808
    for name, values, scales in [
        ("fp32", "5411", "0.0"),
        ("fp16", "2706", "0.0"),
        ("bf16", "2706", "0.0"),
        ("8bit", "1353", "1.6"),
        ("4bit", "676", "84.6"),
    ]:
        got = codec(name).nbytes(shapes, torch.float32)
        assert (f"{got.values / 2**20:.0f}", f"{got.scales / 2**20:.1f}") == (values, scales), name
    tied = codec("fp32").nbytes(shapes[:-1], torch.float32)
    assert f"{tied.total / 2**20:.1f}" == "5018.5"


def test_bytes_by_hand() -> None:
    shapes = [(4096,), (65,), (3, 5), ()]  # 4096, 65, 15 and 1 elements
    assert codec("fp32").nbytes(shapes, torch.float64) == Sizes(4 * 4177)
    assert codec("fp16").nbytes(shapes, torch.float32) == Sizes(2 * 4177)
    assert codec(None).nbytes(shapes, torch.float64) == Sizes(8 * 4177)
    assert codec(None).nbytes(shapes, torch.bfloat16) == Sizes(2 * 4177)
    assert codec("8bit").nbytes(shapes, torch.float32) == Sizes(4177, 4 * 4 + 4 * 1024)
    assert codec("4bit").nbytes(shapes, torch.float32) == Sizes(2048 + 33 + 8 + 1, 4 * (64 + 2 + 1 + 1) + 4 * 64)
    assert codec("4bit").nbytes([4096, 65, 15, 1], torch.float32) == codec("4bit").nbytes(shapes, torch.float32)
    assert codec("8bit").nbytes([], torch.float32) == Sizes(0)
    both = Sizes(3, 4) + Sizes(10, 20)
    assert both == Sizes(13, 24) and both.total == 37


# --- edges


@pytest.mark.parametrize("name", CODECS)
def test_parameters_that_ask_for_gradients_and_empty_tensors_are_fine(name: str | None) -> None:
    one, x = codec(name), torch.nn.Parameter(normal(100))
    if name not in (None, "fp32"):  # those give back x itself
        assert not one.round_trip(x).requires_grad
    for shape in ((0,), (3, 0)):
        empty = torch.empty(shape)
        assert one.round_trip(empty).shape == shape


def test_tables_made_in_inference_mode_serve_outside_of_it() -> None:
    messages._tables.cache_clear()
    x = normal(4096)
    with torch.inference_mode():
        inside = codec("nf4").round_trip(x).clone()
    assert torch.equal(codec("nf4").round_trip(x), inside)
    assert not any(t.is_inference() for t in messages._tables("nf4", x.device))


def test_what_cannot_be_a_message_is_refused() -> None:
    for name in CODECS:
        for x in (torch.arange(5), torch.tensor(1.0)):
            with pytest.raises(TypeError, match="floating-point"):
                codec(name).round_trip(x)
    with pytest.raises(ValueError, match="shape"):
        codec("nf4").round_trip(normal(8), out=normal(4))
