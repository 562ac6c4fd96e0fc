"""What the device halves of the codecs share. torch is imported where it is used: a server needs none.

Laws
* The operations are those of the CPU kernels, in the same order and in float32: same bytes, same bits.
* Nothing is divided by a Python number, only by a tensor: on CUDA the former is a product with the reciprocal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.codecs.base import (
    non_finite,
)
from common.codecs.parts import (
    LARGEST_F32,
    SMALLEST_ABSMAX,
)

if TYPE_CHECKING:
    from torch import Tensor


def require_finite(x: Tensor) -> None:
    """Raise CodecError for NaN or infinity in the vector to encode."""
    if not bool(x.isfinite().all()):
        raise non_finite("The vector to encode")


def groups(x: Tensor, group: int) -> Tensor:
    """(n,) or (blocks, n) -> (groups, group), the last one of each block filled up with zeros."""
    import torch

    missing = -x.shape[-1] % group
    return (torch.nn.functional.pad(x, (0, missing)) if missing else x).reshape(-1, group)


def ungrouped(rows: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `groups`, for what x of that shape became."""
    return rows.view(*shape[:-1], -1)[..., : shape[-1]]


def lengths(n: int, group: int, device: Any) -> Tensor:
    """(groups, 1) float64: how many elements each group really has."""
    import torch

    found = torch.full((-(-n // group), 1), float(group), dtype=torch.float64, device=device)
    found[-1] = n - group * (found.numel() - 1)
    return found


def scales(absmax: Tensor, levels: float, largest: float) -> Tensor:
    """min(absmax / levels, largest), and 0 where absmax is too small to divide by."""
    found = (absmax / absmax.new_full((), levels)).clamp(max=largest)
    return found.where(absmax >= float(SMALLEST_ABSMAX), found.new_zeros(()))


def divided(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, and 0 where the scale is 0. x: (groups, group), scale: (groups, 1)."""
    safe = scale.where(scale > 0, scale.new_full((), float(LARGEST_F32)))
    return x / safe


def as_bytes(*parts: Tensor, blocks: Sequence[int] = ()) -> Tensor:
    """One after the other, as bytes; of each block, where there are so many: (*blocks, bytes of one)."""
    import torch

    return torch.cat([part.contiguous().view(*blocks, -1).view(torch.uint8) for part in parts], -1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(n,) or (blocks, n) codes below 2^bits -> bytes, the first code in the lowest bits, the last byte of each block
    filled up with zeros."""
    import torch

    per_byte = 8 // bits
    rows = groups(codes.to(torch.uint8), per_byte)
    found = torch.zeros_like(rows[:, 0])
    for place in range(per_byte):
        found |= rows[:, place] << bits * place
    return found.view(*codes.shape[:-1], -1)


def unpack(data: Tensor, bits: int, n: int) -> Tensor:
    """The inverse of `pack`: (n,) or (blocks, n) uint8."""
    import torch

    parts = [data >> bits * place & (1 << bits) - 1 for place in range(8 // bits)]
    return torch.stack(parts, -1).view(*data.shape[:-1], -1)[..., :n]


def floats(data: Tensor) -> Tensor:
    """Bytes, of one block or of many, as the float32 that they are."""
    import torch

    return data.contiguous().view(torch.float32)
