"""Convolution, pool and ReLU in one give what the three give, and their gradients, wherever those are defined."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from worker.tasks.pooled import conv_pool_relu


def plain(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return functional.relu(functional.max_pool2d(conv(x), 2))


def results(function: object, x: Tensor, conv: nn.Conv2d, weights: Tensor) -> list[Tensor]:
    """The value and the gradients of its sum under these weights, in float64."""
    assert callable(function)
    x = x.clone().requires_grad_(x.requires_grad)
    z = function(x, conv)
    inputs = [*conv.parameters(), *([x] if x.requires_grad else [])]
    return [one.double() for one in (z.detach(), *torch.autograd.grad((z * weights).sum(), inputs))]


@pytest.mark.parametrize("first_layer", [True, False])
@pytest.mark.parametrize(
    ("n", "c", "size", "o", "k"), [(3, 1, 28, 10, 5), (3, 10, 12, 20, 5), (2, 3, 9, 4, 2), (1, 2, 4, 1, 3)]
)
def test_it_is_the_three_operations(n: int, c: int, size: int, o: int, k: int, first_layer: bool) -> None:
    torch.manual_seed(size)
    conv = nn.Conv2d(c, o, k)
    x = torch.randn(n, c, size, size, requires_grad=not first_layer)
    weights = torch.randn_like(plain(x, conv))
    weights *= torch.rand_like(weights) < 0.5  # as dropout does
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = results(
            conv_pool_relu, x.detach().to(memory_format=layout).requires_grad_(not first_layer), conv, weights
        )
        for one, reference in zip(ours, results(plain, x, conv, weights), strict=True):
            torch.testing.assert_close(one, reference, rtol=1e-5, atol=1e-6 * max(1, reference.abs().max().item()))


def test_of_equal_places_the_first_has_the_gradient() -> None:
    conv = nn.Conv2d(1, 1, 1)
    nn.init.ones_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    conv_pool_relu(x, conv).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[[1, 0], [0, 0]]]]


def test_where_relu_is_off_nothing_goes_back() -> None:
    conv = nn.Conv2d(2, 3, 3)
    nn.init.constant_(conv.bias, -100)  # type: ignore[arg-type]
    z = conv_pool_relu(torch.randn(2, 2, 8, 8), conv)
    z.sum().backward()
    assert not z.any()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in conv.parameters())


@pytest.mark.parametrize("place", range(4))
def test_what_is_not_a_number_stays_so(place: int) -> None:
    """A model that diverged must not look sane."""
    conv = nn.Conv2d(1, 2, 1)
    x = torch.zeros(1, 1, 2, 2)
    x.view(-1)[place] = float("nan")
    assert conv_pool_relu(x, conv).isnan().all()


def test_twice_the_same_is_the_same_bit_for_bit() -> None:
    conv, x = nn.Conv2d(10, 20, 5), torch.randn(8, 10, 12, 12, requires_grad=True)
    one, same = (results(conv_pool_relu, x, conv, torch.ones(())) for _ in range(2))
    assert all(map(torch.equal, one, same))


def test_other_dtypes_and_no_samples_take_the_plain_way() -> None:
    conv, x = nn.Conv2d(1, 2, 3).double(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(conv_pool_relu(x, conv), plain(x, conv))
    assert conv_pool_relu(x[:0], conv).shape == (0, 2, 3, 3)
