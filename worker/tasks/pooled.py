"""Convolution, 2 x 2 max-pool and ReLU as one operation, in half the time on a CPU.

    z = relu(max_pool2d(conv2d(x, weight, bias), 2))

Of four places under a pool one has a gradient, and none where ReLU is off: the backward pass of the convolution goes
from place to place that has one, instead of over all of them. The same sums in another order: values and gradients are
those of the three operations to float rounding, NaN included, and two runs are the same bit for bit.

Left out: stride, padding, gradients of gradients; other devices and dtypes than float32 on a CPU, input without
samples, and gradients of single samples (`torch.func`) take the three operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.grad import conv2d_weight

from common.kernels import kernel

OFF = 4
"""In place of the place of the maximum, 0 to 3 in rows: ReLU is off, nothing goes back."""

Floats = NDArray[np.float32]
Places = NDArray[np.uint8]


def conv_pool_relu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """(n, c, h, w) -> (n, o, (h - k + 1) // 2, (w - k + 1) // 2); conv: c -> o channels, k x k, with a bias."""
    weight, bias = conv.weight, conv.bias
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and len(x)
    if plain and not torch._C._are_functorch_transforms_active():
        z: Tensor = _ConvPoolRelu.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return z
    return functional.relu(functional.max_pool2d(functional.conv2d(x, weight, bias), 2))


class _ConvPoolRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.to(memory_format=torch.channels_last)
        y = _channels_last(functional.conv2d(x, weight, bias))
        n, h, w, o = y.shape
        z = y.new_empty(n, h // 2, w // 2, o)
        places = torch.empty(z.shape, dtype=torch.uint8)
        _pool(y.numpy(), z.numpy(), places.numpy())
        ctx.save_for_backward(x, weight, places)
        ctx.conv_shape = y.shape
        return z.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight, places = ctx.saved_tensors
        dz = _channels_last(dz)
        dbias = torch.zeros(len(weight))
        if not ctx.needs_input_grad[0]:  # the first layer: rows of so few channels are slower one by one
            dy = dz.new_zeros(ctx.conv_shape)
            _unpool(dz.numpy(), places.numpy(), dy.numpy(), dbias.numpy())
            return None, conv2d_weight(x, weight.shape, dy.permute(0, 3, 1, 2)), dbias
        x, weight = _channels_last(x), _channels_last(weight)
        dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
        _conv_backward(dz.numpy(), places.numpy(), _rows(x), _rows(weight), _rows(dx), _rows(dweight), dbias.numpy())
        return dx.permute(0, 3, 1, 2), dweight.permute(0, 3, 1, 2), dbias


def _channels_last(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, h, w, c), contiguous."""
    return x.permute(0, 2, 3, 1).contiguous()


def _rows(x: Tensor) -> Floats:
    """(n, h, w, c) -> (n, h, w * c), the same memory."""
    rows: Floats = x.detach().flatten(2).numpy()
    return rows


@kernel
def _pool(y: Floats, z: Floats, places: Places) -> None:
    """y: (n, h, w, o) -> z: (n, h // 2, w // 2, o), the relu of the maxima, and their places, the first of equals."""
    n, h, w, o = z.shape
    for a in range(n):
        for i in range(h):
            for j in range(w):
                z_row, places_row = z[a, i, j], places[a, i, j]
                for k in range(o):
                    most, place = np.float32(0), OFF
                    for p in range(4):
                        one = y[a, 2 * i + (p >> 1), 2 * j + (p & 1), k]
                        if one > most or one != one:
                            most, place = one, p
                    z_row[k], places_row[k] = most, place


@kernel
def _unpool(dz: Floats, places: Places, dy: Floats, dbias: Floats) -> None:
    """dz: (n, h // 2, w // 2, o) -> dy: (n, h, w, o), zeros before, and its sums per channel."""
    n, h, w, o = dz.shape
    for a in range(n):
        for i in range(h):
            for j in range(w):
                for k in range(o):
                    d, p = dz[a, i, j, k], places[a, i, j, k]
                    if p != OFF:
                        dy[a, 2 * i + (p >> 1), 2 * j + (p & 1), k] = d
                        dbias[k] += d


@kernel
def _conv_backward(
    dz: Floats, places: Places, x: Floats, weight: Floats, dx: Floats, dweight: Floats, dbias: Floats
) -> None:
    """dz: (n, h, w, o); x, dx: (n, rows, columns * c); weight, dweight: (o, k, k * c); the three results start at 0."""
    n, h, w, o = dz.shape
    kernel_rows, length = weight.shape[1:]
    channels = length // kernel_rows
    for a in range(n):
        for i in range(h):
            for j in range(w):
                for k in range(o):
                    d, p = dz[a, i, j, k], places[a, i, j, k]
                    if d == 0 or p == OFF:
                        continue
                    dbias[k] += d
                    left = (2 * j + (p & 1)) * channels
                    for r in range(kernel_rows):
                        top = 2 * i + (p >> 1) + r
                        x_row, dx_row = x[a, top, left : left + length], dx[a, top, left : left + length]
                        weight_row, dweight_row = weight[k, r], dweight[k, r]
                        for q in range(length):
                            dweight_row[q] += d * x_row[q]
                        for q in range(length):
                            dx_row[q] += d * weight_row[q]
