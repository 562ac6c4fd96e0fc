"""The mechanisms: what they do to the gradient of each sample, to the moments that the paper proves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ConfigError
from tests.unit.worker.test_diversity import grads
from worker.mechanisms import Mechanism, backward, langevin, parse, per_example, quantise
from worker.moments import moments

REPEATS = 40_000
STANDARD_ERRORS = 5.0


def mechanism(text: str) -> Mechanism:
    found = parse(text)
    assert found is not None
    return found


def drawn(text: str, g: Tensor) -> Tensor:
    """(REPEATS, n, d): what becomes of the n gradients, again and again; as two tensors, for one norm over both."""
    torch.manual_seed(0)
    n, d = g.shape
    made = mechanism(text)
    parts = made.change([part.repeat(REPEATS, 1) for part in g.split([1, d - 1], dim=1)], made.parameter)
    return torch.cat(parts, dim=1).view(REPEATS, n, d)


@pytest.mark.parametrize("name", ["GD1", "GD2"])
@pytest.mark.parametrize("text", ["dropconnect:0.5", "dropconnect:0.4", "langevin:0.7", "quantise"])
def test_the_bound_is_what_the_paper_proves(text: str, name: str) -> None:
    """n sum E |g_i|^2 / E |sum g_i|^2, Monte Carlo: within 5 standard errors of either mean."""
    g = grads(name)
    found = drawn(text, g)
    squares, totals = found.square().sum((1, 2)), found.sum(1).square().sum(1)
    errors = sum(float(each.std() / each.mean()) / math.sqrt(REPEATS) for each in (squares, totals))
    exact, made = moments([g]), mechanism(text)
    expected = getattr(exact, made.name)(*([] if made.name == "quantise" else [made.parameter]))
    bound = len(g) * float(squares.mean() / totals.mean())
    assert bound == pytest.approx(expected, rel=STANDARD_ERRORS * errors)
    assert expected >= exact.bound


@pytest.mark.parametrize(("text", "factor"), [("dropconnect:0.25", 0.75), ("langevin:0.5", 1.0), ("quantise", 1.0)])
def test_the_mean_stays_but_for_dropconnect(text: str, factor: float) -> None:
    g = grads("GD2")
    found = drawn(text, g)
    errors = found.std(0) / math.sqrt(REPEATS)
    assert bool(((found.mean(0) - factor * g).abs() <= STANDARD_ERRORS * errors + 1e-12).all())


def test_draws_are_independent_over_samples_and_steps() -> None:
    g = torch.ones(2, 3, dtype=torch.float64)
    found = drawn("dropconnect:0.5", g).view(REPEATS, -1)
    correlation = torch.corrcoef(found.T) - torch.eye(6, dtype=torch.float64)
    assert float(correlation.abs().max()) < STANDARD_ERRORS / math.sqrt(REPEATS)


def test_the_quantiser_has_one_level_and_takes_the_norm_of_the_whole_vector() -> None:
    found = drawn("quantise", grads("GD1"))
    for i, norm in enumerate([1.0, 1.0, math.sqrt(2), math.sqrt(2)]):
        levels = found[:, i].abs().unique()
        assert all(min(abs(level), abs(level - norm)) < 1e-12 for level in levels.tolist())
    assert quantise([torch.zeros(2, 3)])[0].abs().sum() == 0


def test_langevin_noise_is_per_coordinate() -> None:
    torch.manual_seed(0)
    [found] = langevin([torch.zeros(100, 100)], 0.5)
    assert float(found.std()) == pytest.approx(0.5, rel=0.03)


# --- the gradient of each sample ---


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def network(*more: nn.Module) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), *more, nn.Flatten(), nn.Linear(3 * 16, 4))


def batch(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(n, 1, 6, 6, generator=generator), torch.randint(0, 4, (n,), generator=generator)


class Laid(nn.Module):
    """Asks for a memory format, which vmap cannot give."""

    def forward(self, x: Tensor) -> Tensor:
        return x.to(memory_format=torch.channels_last).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("more", [(), (nn.GroupNorm(1, 3),), (Laid(),)], ids=["plain", "group norm", "format"])
def test_each_sample_has_its_own_gradient(more: tuple[nn.Module, ...]) -> None:
    model, (x, y) = network(*more), batch()
    g, losses = per_example(model, loss_of, (x, y))
    for i in range(len(x)):
        loss = loss_of(model, (x[i : i + 1], y[i : i + 1]))
        torch.testing.assert_close(losses[i], loss.detach())
        for each, expected in zip(g, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            torch.testing.assert_close(each[i], expected, rtol=1e-4, atol=1e-6)


def test_without_a_change_it_is_the_backward_pass() -> None:
    model, other, data = network(), network(), batch()
    fed: list[Any] = []
    for _ in range(2):  # gradients add up
        loss = backward(model, loss_of, data, mechanism("dropconnect:0"), lambda *what: fed.append(what))
        expected = loss_of(other, data)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    g_a, g_b, (a, b) = fed[0]
    assert (a, b) == (3, 4)
    for first, second, parameter in zip(g_a, g_b, model.parameters(), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close((3 * first + 4 * second) / 7, parameter.grad / 2, rtol=1e-4, atol=1e-6)


def test_dropout_is_drawn_for_each_sample() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1))
    g, _ = per_example(model, lambda model, x: model(x).mean(), torch.ones(2, 50))
    assert not torch.equal(g[0][0], g[0][1])


def test_batch_norm_is_refused_where_it_joins_samples() -> None:
    model = network(nn.BatchNorm2d(3))
    with pytest.raises(ConfigError, match=r"Batch norm \('2'\)"):
        per_example(model, loss_of, batch())
    model.eval()
    g, _ = per_example(model, loss_of, batch())
    assert len(g[0]) == 7


@pytest.mark.parametrize("data", [[1, 2], (torch.ones(3), torch.ones(2)), {"x": torch.ones(())}, "text"])
def test_batches_that_are_no_samples_are_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="first dimension"):
        per_example(nn.Linear(1, 1), lambda model, batch: model(batch).mean(), data)


def test_a_loss_that_looks_at_values_is_refused_in_words() -> None:
    def looks(model: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = model(x).mean()
        return found if found.item() > 0 else -found

    with pytest.raises(ConfigError, match="single samples cannot be taken"):
        per_example(nn.Linear(1, 1), looks, torch.ones(3, 1))


# --- words ---


def test_a_mechanism_by_its_words() -> None:
    assert parse("") is None
    assert mechanism("dropconnect:0.5")[:2] == ("dropconnect", 0.5)
    assert mechanism("langevin:0.01")[:2] == ("langevin", 0.01)
    assert mechanism("quantise")[:2] == ("quantise", 0.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dropconect:0.5", "did you mean 'dropconnect'"),
        ("dropconnect", "cannot be ''"),
        ("dropconnect:1", "from 0 to below 1"),
        ("dropconnect:-0.1", "from 0 to below 1"),
        ("langevin:nan", "standard deviation"),
        ("langevin:inf", "standard deviation"),
        ("langevin:-1", "standard deviation"),
        ("quantise:4", "takes no parameter"),
    ],
)
def test_other_words_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert words in f"{caught.value.sentence} {caught.value.fix}"
