"""Task `charlm`: what is told from what, how the text is cut, and where it comes from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from worker.loop import train_alone
from worker.tasks import Context, charlm

ALPHABET = bytes(range(97, 123))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other longer than so small a model computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def network() -> charlm.Network:
    torch.manual_seed(0)
    return charlm.Network()


def text(length: int) -> Tensor:
    """No two windows of it are alike."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)).to(torch.uint8)


def test_a_character_is_told_from_those_before_it_alone(network: charlm.Network) -> None:
    x = text(charlm.CONTEXT).long().unsqueeze(0)
    changed = x.clone()
    changed[0, 40] = (x[0, 40] + 1) % 256
    before, after = network(x), network(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert (before[:, 40:] != after[:, 40:]).any(2).all()
    torch.testing.assert_close(network(x[:, :10]), before[:, :10])


def test_at_first_every_character_is_as_likely(network: charlm.Network) -> None:
    logits = network(text(charlm.CONTEXT).long().unsqueeze(0))
    assert logits.shape == (1, charlm.CONTEXT, charlm.CHARACTERS)
    assert logits.std().item() < 0.5
    assert sum(parameter.numel() for parameter in network.parameters()) == 366_432


def test_what_is_asked_for_is_the_next_character() -> None:
    whole = text(1000)
    for x, y in charlm.Windows(whole, seed=3):
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert x.dtype == y.dtype == torch.int64
    x, y = charlm.windows(whole)
    assert torch.equal(x.flatten(), whole[: x.numel()])
    assert torch.equal(y.flatten(), whole[1 : x.numel() + 1])


@pytest.mark.parametrize("length", [charlm.CONTEXT + 1, charlm.CONTEXT + 2, 1000, 64 * 20, 64 * 20 + 1])
def test_all_but_a_window_is_cut_into_windows(length: int) -> None:
    x, _ = charlm.windows(text(length))
    assert length - charlm.CONTEXT - 1 < x.numel() < length


def test_each_pass_goes_through_the_text_cut_anew() -> None:
    whole = text(2000)
    batches = charlm.Windows(whole, seed=1)
    passes = [torch.cat([x for x, _ in batches]) for _ in range(2)]
    assert all(2000 - 2 * charlm.CONTEXT < one.numel() < 2000 for one in passes)
    assert all(len({tuple(window) for window in one.tolist()}) == len(one) for one in passes)
    first, second = ({tuple(window) for window in one.tolist()} for one in passes)
    assert not first & second
    again = charlm.Windows(whole, seed=1)
    assert all(torch.equal(one, torch.cat([x for x, _ in again])) for one in passes)


def test_nothing_that_is_tested_on_is_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes(bytes(9000) + b"x" * 1000)
    task = charlm.make(Context(data=file))
    assert not any(x.any() or y.any() for x, y in itertools.chain(task.batches, task.batches))
    evaluation = task.evaluate(task.model)
    assert evaluation is not None
    assert 1000 - charlm.CONTEXT <= evaluation.samples < 1000


def test_charlm_learns(tmp_path: Path) -> None:
    (tmp_path / "alphabet.txt").write_bytes(ALPHABET * 400)
    task = charlm.make(Context(data=tmp_path))
    train_alone(task, 25)
    evaluation = task.evaluate(task.model)
    assert evaluation is not None
    assert evaluation.loss < 2
    assert evaluation.accuracy > 0.9


def test_without_data_it_reads_the_text_that_comes_along() -> None:
    one, other = charlm.make(Context(1, 4)), charlm.make(Context(2, 4))
    x, _ = next(iter(one.batches))
    assert bytes(charlm.TEXT.read_bytes()).startswith(b"PRIDE AND PREJUDICE")
    assert bytes(x[0].tolist()) in charlm.TEXT.read_bytes()
    assert not torch.equal(x, next(iter(other.batches))[0])


@pytest.mark.parametrize(
    ("files", "name", "says"),
    [
        ((), ".", r"holds 0 files that end in \.txt\. Give --data the file itself, or leave it out"),
        (("a.txt", "b.txt"), ".", r"holds 2 files"),
        ((), "c.txt", r"c\.txt cannot be read: No such file or directory\. Give --data"),
        (("a.txt",), "a.txt", r"a\.txt has 7 characters, fewer than 2000"),
    ],
)
def test_a_text_that_cannot_be_used_says_why(tmp_path: Path, files: tuple[str, ...], name: str, says: str) -> None:
    for file in files:
        (tmp_path / file).write_text("a text\n")
    with pytest.raises(ConfigError, match=says):
        charlm.make(Context(data=tmp_path / name))
