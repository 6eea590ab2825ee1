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

    def fill(self, flat: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """Copy `params` into `flat` (`[numel]`), casting to the layout's dtype; returns `flat`.

        Raises:
            KeyError: if a name is missing.
        """
        for name, view in self.views(flat).items():
            view.copy_(params[name])
        return flat


def sub(a: Params, b: Params) -> Params:
    """a - b, tensor by tensor; shapes may carry a leading lane axis in `a` alone."""
    return dict(zip(a, torch._foreach_sub([a[n] for n in a], [b[n] for n in a]), strict=True))


def add(a: Params, b: Params) -> Params:
    """a + b, tensor by tensor."""
    return dict(zip(a, torch._foreach_add([a[n] for n in a], [b[n] for n in a]), strict=True))


def clone(a: Params) -> Params:
    """A copy that shares no memory with `a`."""
    return {n: t.detach().clone() for n, t in a.items()}
