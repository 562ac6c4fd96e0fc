"""`fp32`: the identity. 4 bytes per element, lossless, little-endian IEEE 754 single precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.codecs import tensors
from common.codecs.base import (
    EXPONENT,
    F32,
    U8,
    Codec,
    Device,
    all_finite,
    copy_finite,
    expect_bytes,
    exponent,
    goes_far,
    kernel,
    non_finite,
    put,
    settle,
)

if TYPE_CHECKING:
    from torch import Tensor


@kernel
def _add(x: Any, c: Any, weight: Any, out: Any, far: Any) -> bool:
    wanted, top = out.size > 0, np.uint32(0)
    for i in range(c.size):
        c[i] += weight * x[i]
        top = max(top, exponent(c[i]))
        if wanted:
            put(out, i, c[i], far)
    settle(far)
    return bool(top < EXPONENT)


def encode(x: F32, out: U8, key: int = 0) -> None:
    bits, in_place = x.view(np.uint32), np.may_share_memory(x, out)
    if not (all_finite(bits, EXPONENT) if in_place else copy_finite(bits, out.view(np.uint32), EXPONENT, False)):
        raise non_finite("The vector to encode")


def check(data: U8, n: int) -> None:
    expect_bytes(data, 4 * n)
    if not all_finite(data.view(np.uint32), EXPONENT):
        raise non_finite("The update")


def decode(data: U8, x: F32) -> None:
    x[:] = data.view(np.float32)


def open_(data: U8, x: F32, size: int) -> None:
    expect_bytes(data, x.nbytes)
    if not copy_finite(data.view(np.uint32), x.view(np.uint32), EXPONENT, goes_far(x, size)):
        raise non_finite("The update")


def add(data: U8, c: F32, weight: np.float32, out: F32, size: int) -> bool:
    return bool(_add(data.view(np.float32), c, weight, out, goes_far(out, size)))


def device_encode(x: Tensor, key: int) -> Tensor:
    tensors.require_finite(x)
    return tensors.as_bytes(x, blocks=x.shape[:-1])


def device_decode(data: Tensor, n: int) -> Tensor:
    return tensors.floats(data).clone()


CODEC = Codec(
    name="fp32",
    summary="single precision, as it is",
    paper="IEEE 754",
    when="fast links; whatever must not change a bit",
    bytes_per_element="4",
    lossless=True,
    unbiased=True,
    dense="fp32",
    feedback="never",
    contraction=1.0,
    encoded_bytes=lambda n: 4 * n,
    encode=encode,
    check=check,
    decode=decode,
    error_bound=np.zeros_like,
    device=Device(device_encode, device_decode, together=True),
    seamless=True,
    view=lambda data: data.view(np.float32),
    open=open_,
    add=add,
)
