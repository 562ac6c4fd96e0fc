"""Batches of labelled samples: each pass a new order, no sample twice, and an evaluation of all of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from worker.tasks.labelled import Shuffled, evaluate

X, Y = torch.arange(10.0).unsqueeze(1), torch.arange(10)


def samples(batches: Shuffled) -> list[list[int]]:
    """The labels of one pass, batch by batch; each beside its own sample."""
    made = list(batches)
    assert all(torch.equal(x.squeeze(1).long(), y) for x, y in made)
    return [y.tolist() for _, y in made]


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def test_each_pass_holds_every_sample_once_in_a_new_order() -> None:
    batches = Shuffled(X, Y, 4, seed=1)
    first, second = samples(batches), samples(batches)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(flat(first)) == sorted(flat(second)) == Y.tolist()
    assert first != second
    assert samples(Shuffled(X, Y, 4, seed=1)) == first
    assert samples(Shuffled(X, Y, 4, seed=2)) != first


def test_whole_batches_only_leave_out_others_each_pass() -> None:
    batches = Shuffled(X, Y, 4, seed=1, whole=True)
    passes = [samples(batches) for _ in range(20)]
    assert all([len(batch) for batch in one] == [4, 4] for one in passes)
    assert all(len(set(flat(one))) == 8 for one in passes)
    assert {label for one in passes for label in Y.tolist() if label not in flat(one)} == set(Y.tolist())


def test_a_change_is_made_to_each_batch_from_the_same_seed() -> None:
    def noise(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + torch.rand(x.shape, generator=generator)

    one, same = (torch.cat([x for x, _ in Shuffled(X, Y, 4, seed=1, change=noise)]) for _ in range(2))
    assert torch.equal(one, same)
    assert (one != one.round()).any()
    assert torch.equal(X, X.round())


@pytest.mark.parametrize("n", [1, 999, 2500])
def test_an_evaluation_is_over_all_samples(n: int) -> None:
    torch.manual_seed(n)
    x, y = torch.randn(n, 5), torch.randint(0, 3, (n,))
    model = nn.Linear(5, 3)
    found = evaluate(model, x, y)
    assert found.samples == n
    assert found.loss == pytest.approx(nn.functional.cross_entropy(model(x), y).item(), rel=1e-5)
    assert found.accuracy == pytest.approx((model(x).argmax(1) == y).float().mean().item())
