"""The estimator: unbiased, exact where it can be, and no gradient is another because it was looked at."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from common.errors import UsageError
from worker.diversity import Meter, estimate, estimate_groups, halves
from worker.mechanisms import per_example
from worker.moments import Moments, moments
from worker.tasks import Context, digits

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[2] / "golden" / "gradient_diversity.json").read_text(encoding="utf-8")
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def grads(name: str, key: str = "grads") -> Tensor:
    return torch.tensor(VECTORS[name][key], dtype=torch.float64)


def close(found: float, expected: float, tolerance: float = 1e-11) -> None:
    assert abs(found - expected) <= tolerance, (found, expected)


# --- exactly ---


def test_vectors_of_the_definitions() -> None:
    found, row = moments([grads("GD1")]), VECTORS["GD1"]
    close(found.diversity, row["Delta"])
    close(found.bound, row["B"])
    close(found.squares / found.samples, row["M2"])
    close(found.gradient, row["G2"])
    close(found.noise, row["trSigma"])
    close(found.noise / found.gradient, row["Bsimple"])


@pytest.mark.parametrize("name", ["GD1", "GD2"])
def test_vectors_of_the_mechanisms(name: str) -> None:
    found, rows = moments([grads(name)[:1], grads(name)[1:]]), VECTORS[name] | VECTORS.get(f"{name}_DIM", {})
    close(found.bound, rows["B"])
    close(found.dropconnect(0.5), rows["B_drop_p0_5"])
    close(found.langevin(math.sqrt(0.5)), rows["B_sgld_sigma2_0_5"])
    close(found.quantise(), rows["B_quant"])
    if "B_drop_p0_4" in rows:
        close(found.dropconnect(0.4), rows["B_drop_p0_4"])


@pytest.mark.parametrize("size", [2, 3])
def test_the_second_moment_of_a_batch_follows_from_the_bound(size: int) -> None:
    """E |sum of B gradients|^2 = B M^2 (1 + (B - 1) / B_S), over all batches with replacement."""
    g, row = grads("GD1"), VECTORS[f"GD1_secondmoment_B{size}"]
    draws = [g[list(chosen)].sum(0).square().sum() for chosen in itertools.product(range(len(g)), repeat=size)]
    found = moments([g])
    close(float(torch.stack(draws).mean()), row["exact"])
    close(size * found.squares / found.samples * (1 + (size - 1) / found.bound), row["formula"])


def test_vectors_of_the_estimate_from_groups() -> None:
    g, row = grads("GN1", "worker_grads"), VECTORS["GN1"]
    mean, big = float(g.square().sum(1).mean()), float(g.mean(0).square().sum())
    close(mean, row["small"])
    close(big, row["big"])
    gradient, noise = estimate_groups(mean, big, row["P"], row["b"])
    close(gradient, row["G2_hat"])
    close(noise, row["trSigma_hat"])
    close(1 + noise / gradient, row["B_S_hat"])


gradients = st.integers(1, 6).flatmap(
    lambda d: st.lists(st.lists(st.floats(-8, 8, width=32), min_size=d, max_size=d), min_size=2, max_size=8)
)


def useful(rows: list[list[float]]) -> Moments | None:
    """None where the mean gradient is zero but for rounding: then there is no ratio."""
    found = moments([torch.tensor(rows, dtype=torch.float64)])
    return found if found.total > 1e-9 * max(found.squares, 1e-9) else None


@given(rows=gradients)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_bound_is_one_plus_the_noise_scale(rows: list[list[float]]) -> None:
    if (found := useful(rows)) is not None:
        assert found.bound == pytest.approx(1 + found.noise / found.gradient, rel=1e-6)
        assert found.bound >= 1 - 1e-9


@given(rows=gradients, p=st.floats(0, 0.95), sigma=st.floats(0, 3))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_mechanism_never_lowers_a_bound_within_the_data(rows: list[list[float]], p: float, sigma: float) -> None:
    """Theorem 7; beyond n it stays beyond n."""
    if (found := useful(rows)) is None:
        return
    for after in (found.dropconnect(p), found.langevin(sigma), found.quantise()):
        assert after >= min(found.bound, found.samples) * (1 - 1e-9)


# --- the estimate ---


def test_no_mean_gradient_is_an_infinite_bound() -> None:
    assert moments([torch.tensor([[1.0], [-1.0]])]).bound == math.inf
    with pytest.raises(UsageError):
        moments([])


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (1, 3)])
def test_both_parts_are_unbiased(sizes: tuple[int, int]) -> None:
    """Over all batches with replacement."""
    g, (a, b) = grads("GD1"), sizes
    exact = moments([g])
    found = []
    for chosen in itertools.product(range(len(g)), repeat=a + b):
        g_a, g_b = g[list(chosen[:a])].mean(0), g[list(chosen[a:])].mean(0)
        one = estimate(*halves([g_a], [g_b]), sizes)
        found.append((float(one.gradient), float(one.noise)))
    gradient, noise = np.mean(found, axis=0)
    close(gradient, exact.gradient)
    close(noise, exact.noise)


def test_sums_are_over_all_tensors_whatever_their_kind() -> None:
    a = [torch.full((300,), 200.0, dtype=torch.float16), None, torch.ones(2, 2), torch.ones(3), None]
    b = [torch.full((300,), 100.0, dtype=torch.float16), torch.full((5,), 2.0), torch.full((2, 2), -1.0), None, None]
    inner, apart = halves(a, b)
    assert inner.dtype == apart.dtype == torch.float64
    assert float(inner) == 300 * 200.0 * 100.0 - 4.0
    assert float(apart) == 300 * 100.0**2 + 5 * 4.0 + 4 * 4.0 + 3 * 1.0


def test_on_digits_it_comes_within_a_tenth_of_the_exact_value() -> None:
    """At fixed parameters, over many half batches of 32: the ratio of means, as a server forms it."""
    task = digits.make(Context(1))
    x, y = (torch.cat(part)[:256] for part in zip(*task.batches, strict=True))
    g, _ = per_example(task.model, task.loss, (x, y))
    rows = torch.cat([each.flatten(1) for each in g], dim=1)
    exact = moments([rows])
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for _ in range(300):
        a, b = torch.randint(0, len(rows), (2, 32), generator=generator)
        inner, apart = halves([rows[a].mean(0)], [rows[b].mean(0)])
        pairs.append([float(part) for part in estimate(inner, apart, (32, 32))[:2]])
    gradient, noise = np.mean(pairs, axis=0)
    assert 1 + noise / gradient == pytest.approx(exact.bound, rel=0.1)
    raw = np.mean([noise / gradient for gradient, noise in pairs])
    assert abs(1 + raw - exact.bound) > abs(1 + noise / gradient - exact.bound), "a mean of ratios is no estimate"


# --- the meter ---


class Net(nn.Module):
    """Two layers, one frozen parameter, and one that only the first half uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.seldom = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(torch.tanh(self.first(x))) * self.frozen
        return found


X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))


def each_loss(net: Net) -> Tensor:
    """(12,) losses of one graph."""
    return (net(X) - X.sum(1, keepdim=True)).square().squeeze(1)


def grads_of(net: Net) -> list[Tensor | None]:
    return [parameter.grad for parameter in net.parameters()]


def same(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("every", [0, 1], ids=["not measured", "measured"])
@pytest.mark.parametrize("before", [False, True], ids=["empty", "accumulated"])
@pytest.mark.parametrize("cut", [6, 5], ids=["equal", "unequal"])
@pytest.mark.parametrize("shared", [True, False], ids=["one graph", "two graphs"])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_split_gives_the_gradient_of_the_batch(every: int, before: bool, cut: int, shared: bool, scale: float) -> None:
    plain, net = Net(), Net()
    if before:
        for one in (plain, net):
            each_loss(one).sum().backward()
    kept = grads_of(net)
    (each_loss(plain).mean() * scale).backward()
    losses = each_loss(net)
    loss_a = losses[:cut].mean()
    loss_b = (losses if shared else each_loss(net))[cut:].mean()
    loss = Meter(net.parameters(), every).split(loss_a, loss_b, None if cut == 6 else (cut, 12 - cut), scale)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, each_loss(plain).mean().detach())
    same(grads_of(net), grads_of(plain))
    if before:
        assert all(a is b for a, b in zip(grads_of(net), kept, strict=True)), "the same tensors, for whoever holds them"


def test_measured_or_not_the_steps_are_the_same() -> None:
    nets = {every: Net() for every in (0, 1, 3)}
    for every, net in nets.items():
        meter, optimizer = Meter(net.parameters(), every), torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(1, 20):
            optimizer.zero_grad()
            losses = each_loss(net)
            meter.split(losses[:6].mean(), losses[6:].mean(), None, 1.0)
            optimizer.step()
            meter.stepped(step, 12)
        found = meter.take()
        assert (found.measurements if found else 0) == {0: 0, 1: 19, 3: 7}[every]
    for every in (1, 3):
        for a, b in zip(nets[every].parameters(), nets[0].parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def exactly(net: Net, cut: int, size: int) -> tuple[float, float]:
    parameters = [one for one in net.parameters() if one.requires_grad]
    losses = each_loss(net)

    def of(part: slice) -> Tensor:
        found = torch.autograd.grad(losses[part].mean(), parameters, retain_graph=True, allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None]).double()

    g_a, g_b = of(slice(cut)), of(slice(cut, size))
    weight = cut * (size - cut) / size
    return float(g_a @ g_b), weight * float((g_a - g_b).square().sum())


@pytest.mark.parametrize("cut", [6, 5], ids=["equal", "unequal"])
@pytest.mark.parametrize("how", ["split", "split scaled", "measure", "gradients"])
def test_what_is_measured_is_what_the_halves_say(how: str, cut: int) -> None:
    net = Net()
    meter, losses, sizes = Meter(net.parameters(), 1), each_loss(net), (cut, 12 - cut)
    loss_a, loss_b = losses[:cut].mean(), losses[cut:].mean()
    if how == "measure":
        net.last.bias.grad = kept = torch.ones(1)
        meter.measure(loss_a, loss_b, sizes)
        assert net.last.bias.grad is kept
        assert float(kept) == 1.0
        assert net.first.weight.grad is None
    elif how == "gradients":
        parameters = [one for one in net.parameters() if one.requires_grad]
        pair = [torch.autograd.grad(one, parameters, None, True, allow_unused=True) for one in (loss_a, loss_b)]
        meter.gradients(*pair, sizes)
    else:
        meter.split(loss_a, loss_b, None if cut == 6 else sizes, 4096.0 if "scaled" in how else 1.0)
    assert meter.take() is None, "the step is not done"
    meter.stepped(1, 12)
    found = meter.take()
    assert found is not None
    assert (found.gradient, found.noise) == pytest.approx(exactly(net, cut, 12), rel=1e-5)
    assert meter.take() is None


@pytest.mark.parametrize("share", [True, False], ids=["of the mean", "of the sum"])
@pytest.mark.parametrize("groups", [2, 3])
def test_micro_batches_measure_too(share: bool, groups: int) -> None:
    net, size = Net(), 12 // groups
    meter = Meter(net.parameters(), 1)
    for i in range(groups):
        loss = each_loss(net)[i * size : (i + 1) * size].mean()
        (loss / groups if share else loss).backward()
        meter.micro_batch(size, 1.0)
    plain = Net()
    (each_loss(plain).mean() * (1 if share else groups)).backward()
    same(grads_of(net), grads_of(plain))
    meter.stepped(1, 12)
    found = meter.take()
    assert found is not None
    if groups == 2:
        factor = 1 if share else 4
        expected = exactly(net, 6, 12)
        assert (found.gradient, found.noise) == pytest.approx([factor * part for part in expected], rel=1e-4)
    else:
        g, _ = per_example(net, lambda net, x: (net(x) - x.sum(1, keepdim=True)).square().mean(), X)
        rows = torch.cat([each.flatten(1) for each in g], dim=1).double()
        means = rows.view(groups, size, -1).mean(1)
        parts = estimate_groups(float(means.square().sum(1).mean()), float(means.mean(0).square().sum()), groups, size)
        factor = 1 if share else groups**2
        assert (found.gradient, found.noise) == pytest.approx([factor * part for part in parts], rel=1e-4)


def test_what_cannot_be_measured_is_not() -> None:
    net = Net()
    meter = Meter(net.parameters(), 1)
    for size in (8, 4):  # of different sizes
        each_loss(net)[:size].mean().backward()
        meter.micro_batch(size, 1.0)
    meter.stepped(1, 12)
    assert meter.take() is None
    each_loss(net).mean().backward()
    meter.micro_batch(12, 1.0)  # only one
    meter.stepped(2, 12)
    assert meter.take() is None
    losses = each_loss(net)
    meter.split(losses[:6].mean(), losses[6:].mean() * math.inf, None, 1.0)  # as a loss scale that is too large
    meter.stepped(3, 12)
    assert meter.take() is None
    losses = each_loss(net)
    meter.split(losses[:6].mean(), losses[6:].mean(), None, 1.0)
    meter.skipped()
    meter.stepped(4, 12)
    assert meter.take() is None
    table = nn.Embedding(4, 2, sparse=True)
    sparse = Meter(table.parameters(), 1)
    sparse.split(table(torch.tensor([0])).sum(), table(torch.tensor([1])).sum(), None, 1.0)
    sparse.stepped(1, 2)
    assert sparse.take() is None
    assert table.weight.grad is not None
    assert table.weight.grad.to_dense().tolist() == [[0.5, 0.5], [0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]


def test_a_half_without_samples_is_refused() -> None:
    net = Net()
    losses = each_loss(net)
    with pytest.raises(UsageError, match="at least one sample"):
        Meter(net.parameters(), 1).split(losses.mean(), losses[:0].sum(), (12, 0), 1.0)
