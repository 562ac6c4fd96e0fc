"""A torch model <-> the flat float32 vector that its layout describes.

Laws
* Tensors are read and written in place, on whatever device and in whatever dtype they are.
* A tensor shared under several names (tied weights) occurs once. Buffers that the model does not save are left out.
* Wrappers do not show: a compiled or data-parallel model has the layout of the model inside.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import UsageError
from common.layout import DTYPES, Kind, Layout, Tensor, order

Flat: TypeAlias = NDArray[np.float32] | torch.Tensor
"""A flat float32 vector, in host memory or on a device."""


def layout_of(model: torch.nn.Module) -> Layout:
    """The layout of `model`; raises UsageError for what cannot be trained this way."""
    names: dict[int, list[str]] = {}
    found: dict[int, tuple[torch.Tensor, Kind]] = {}
    for tensor, kind, name in _named(model):
        names.setdefault(id(tensor), []).append(name)
        found.setdefault(id(tensor), (tensor, kind))
    tensors = [
        Tensor(
            names[key][0],
            tuple(tensor.shape),
            _dtype(tensor),
            kind,
            tuple(names[key][1:]),
        )
        for key, (tensor, kind) in found.items()
    ]
    for described in tensors:
        if described.kind == "parameter" and described.dtype not in DTYPES:
            raise UsageError(f"Cannot exchange {described}: parameters must be {', '.join(DTYPES)}.")
    if not any(described.kind == "parameter" and described.elements for described in tensors):
        raise UsageError("The model has no parameters to train.", fix="Join after the model is built.")
    return Layout(tuple(sorted(tensors, key=order)))


class Binding:
    """A model's own tensors, bound to the ranges of a flat vector.

    Reads and writes the tensors in place, on whatever device and in whatever dtype they are.
    """

    def __init__(self, model: torch.nn.Module, layout: Layout) -> None:
        by_name = {name: tensor for tensor, _, name in _named(model)}
        self.layout = layout
        devices = {by_name[t.name].device for t in layout.tensors if t.kind != "local" and t.elements}
        self.device = devices.pop() if len(devices) == 1 else None
        """Where all that is exchanged lies; None where it lies on several devices."""
        self.exact = all(t.dtype in ("float32", "float64") for t in layout.tensors if t.kind == "parameter")
        """Whether the parameters hold any float32 value as it is."""
        self._ranges: list[tuple[torch.Tensor, int, int]] = []
        start = 0
        for tensor in layout.tensors:
            if tensor.kind != "local":
                self._ranges.append((by_name[tensor.name], start, start + tensor.elements))
                start += tensor.elements
        self._tensors = [tensor for tensor, _, _ in self._ranges]
        self._views: list[torch.Tensor] = []
        """Of the tensors in one dimension, where all are contiguous; they keep the memory that they show."""
        self._shown: list[int] = []
        """The addresses that the views were made for."""

    @torch.no_grad()
    def gather(self, flat: Flat) -> None:
        """flat: (elements,) <- the model's tensors."""
        torch._foreach_copy_(self._parts(flat), self._flattened())

    @torch.no_grad()
    def gather_state(self, optimizer: torch.optim.Optimizer, key: str, flat: Flat) -> None:
        """flat: (elements,) <- what the optimizer keeps under `key` for each parameter; zero where it keeps nothing."""
        whole = _tensor(flat)
        for tensor, first, last in self._ranges:
            kept = optimizer.state[tensor].get(key) if tensor in optimizer.state else None
            if kept is None:
                whole[first:last].zero_()
            else:
                whole[first:last].copy_(kept.reshape(-1))

    @torch.no_grad()
    def scatter(self, flat: Flat) -> None:
        """The model's tensors <- flat: (elements,)."""
        parts = self._parts(flat)
        if self._contiguous():
            torch._foreach_copy_(self._flattened(), parts)
        else:
            for tensor, part in zip(self._tensors, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def _parts(self, flat: Flat) -> list[torch.Tensor]:
        """Views of a flat vector, one for each tensor."""
        return list(_tensor(flat).split([last - first for _, first, last in self._ranges]))

    def _contiguous(self) -> bool:
        return all(map(torch.Tensor.is_contiguous, self._tensors))

    def _flattened(self) -> list[torch.Tensor]:
        """The tensors, each in one dimension: views where all are contiguous, else copies of those that are not.

        To make views of a hundred tensors takes longer than to copy a small model, so they are kept. A tensor that
        was given other memory has another address, since the views keep the one it had.
        """
        if not self._contiguous():
            return [tensor.detach().reshape(-1) for tensor in self._tensors]
        addresses = list(map(torch.Tensor.data_ptr, self._tensors))
        if addresses != self._shown:
            self._shown, self._views = addresses, [tensor.detach().view(-1) for tensor in self._tensors]
        return self._views


def _tensor(flat: Flat) -> torch.Tensor:
    return flat if isinstance(flat, torch.Tensor) else torch.from_numpy(flat)


def _named(model: torch.nn.Module) -> Iterable[tuple[torch.Tensor, Kind, str]]:
    saved = model.state_dict(keep_vars=True).keys()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield parameter, "parameter", _plain(name)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in saved:
            yield buffer, "buffer" if _dtype(buffer) in DTYPES else "local", _plain(name)


def _plain(name: str) -> str:
    """A tensor's name without what torch.compile and DistributedDataParallel put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
