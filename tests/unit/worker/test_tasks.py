"""Tasks: what every built-in task promises, what may be in a user's own file, and what is said where it is wrong."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from common.errors import ConfigError
from tests.unit.worker.test_cifar10 import write_cifar10
from tests.unit.worker.test_mnist import write_mnist
from worker import tasks
from worker.loop import train_alone
from worker.tasks import Context, Task, digits
from worker.tasks.base import first_halves, first_length

Write = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other longer than such small models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WRITE = {"mnist": write_mnist, "cifar10": write_cifar10}
"""For tasks that read a data set: a small one."""


@pytest.fixture(params=tasks.names(), scope="module")
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tasks.TaskFamily]:
    family = tasks.load(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        write = WRITE.get(family.name)
        data = write(tmp_path_factory.mktemp(family.name) / "data", train=256, test=20) if write else None
        yield family._replace(make=lambda context: family.make(context._replace(data=data)))


def weights(task: Task) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in task.model.parameters()]


def first_batches(task: Task, count: int = 50) -> list[Any]:
    """More than one pass over the digits."""
    return list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(task.batches)), count))


def equal(left: Any, right: Any) -> bool:
    """Whether two nests of tensors are the same, bit for bit."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    return len(left) == len(right) and all(map(equal, left, right))


# --- what every built-in task promises ---


def test_one_context_makes_one_task(family: tasks.TaskFamily) -> None:
    one, same = family.make(Context(3, 4)), family.make(Context(3, 4))
    assert equal(weights(one), weights(same))
    assert equal(first_batches(one), first_batches(same))


def test_workers_share_the_weights_and_not_the_order(family: tasks.TaskFamily) -> None:
    one, other = family.make(Context(1, 4)), family.make(Context(2, 4))
    assert equal(weights(one), weights(other))
    assert not equal(first_batches(one), first_batches(other))


def test_another_model_seed_makes_other_weights(family: tasks.TaskFamily) -> None:
    assert not equal(weights(family.make(Context(1, 4))), weights(family.make(Context(1, 5))))


def test_making_a_task_leaves_the_callers_random_numbers_alone(family: tasks.TaskFamily) -> None:
    before = torch.random.get_rng_state()
    first_batches(family.make(Context(1, 4)))
    assert torch.equal(before, torch.random.get_rng_state())


def test_evaluating_changes_nothing(family: tasks.TaskFamily) -> None:
    task = family.make(Context())
    before = weights(task)
    for training in (True, False):
        task.model.train(training)
        assert task.evaluate(task.model) == task.evaluate(task.model)
        assert task.model.training is training
    assert equal(before, weights(task))
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_a_family_says_what_it_is(family: tasks.TaskFamily) -> None:
    assert family.name in tasks.names()
    assert 0 < len(family.summary) < 80


# --- digits ---


def test_every_pass_holds_every_digit_to_train_on_once() -> None:
    a, b = (digits.make(Context(seed)) for seed in (1, 2))
    passes = [torch.cat([x for x, _ in task.batches]).flatten(1) for task in (a, a, b)]
    in_order = [sorted(map(tuple, one.tolist())) for one in passes]
    assert in_order[0] == in_order[1] == in_order[2]
    evaluation = a.evaluate(a.model)
    assert evaluation is not None
    assert len(passes[0]) + evaluation.samples == 1797
    assert evaluation.samples == pytest.approx(0.2 * 1797, abs=5)
    assert passes[0].mean().item() == pytest.approx(0, abs=1e-4)
    assert passes[0].std().item() == pytest.approx(1, abs=1e-4)


def test_the_split_takes_the_same_share_of_every_class_and_of_no_sample_twice() -> None:
    labels = torch.arange(10).repeat_interleave(torch.arange(100, 200, 10))
    train, test = digits.split(labels)
    assert sorted(train.tolist() + test.tolist()) == list(range(len(labels)))
    assert labels[test].bincount().tolist() == [round(0.2 * n) for n in range(100, 200, 10)]


def test_digits_alone_learns() -> None:
    task = digits.make(Context())
    before = task.evaluate(task.model)
    train_alone(task, 200)
    after = task.evaluate(task.model)
    assert before is not None
    assert after is not None
    assert before.accuracy < 0.3
    assert after.accuracy > 0.9
    assert after.loss < before.loss


def test_without_scikit_learn_digits_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sklearn", "sklearn.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "digits" in tasks.names()
    family = tasks.load("digits")
    monkeypatch.setattr(digits, "_digits", digits._digits.__wrapped__)  # what was read is read once
    with pytest.raises(ConfigError, match=r"pip install 'paramserver\[demo\]'"):
        family.make(Context())


# --- a user's own file ---

HEAD = """
import torch
from torch.nn.functional import mse_loss
from worker.tasks import Task

def parts():
    model = torch.nn.Linear(2, 1)
    batches = [(torch.ones(4, 2), torch.ones(4, 1))]
    return model, torch.optim.SGD(model.parameters(), lr=0.1), batches, lambda model, b: mse_loss(model(b[0]), b[1])
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a task file; what loading it does to this process is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)

    def file(text: str) -> Path:
        path = tmp_path / "my_task.py"
        path.write_text(HEAD + textwrap.dedent(text))
        return path

    yield file
    for name in ("my_task", "my_helper", "task_my_task"):
        if name not in modules:
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "function",
    [
        "def make_task(context): assert context.seed == 7; return parts()",
        "def make_task(anything): assert anything.seed == 7; return parts()",
        "def make_task(epochs=3, context=None): assert context.seed == 7; return parts()",
        "def make_task(epochs=3): assert epochs == 3; return parts()",
        "def make_task(): return parts()",
        "def make_task(): return Task(*parts())",
        "make_task = lambda context: Task(*parts())",
    ],
)
@pytest.mark.parametrize("ending", ["", ":", ":make_task"])
def test_a_function_with_or_without_context_may_return_a_task_or_its_parts(
    write: Write, function: str, ending: str
) -> None:
    name = f"{write(function)}{ending}"
    family = tasks.load(name)
    task = family.make(Context(seed=7))
    assert family.name == name
    assert isinstance(task, Task)
    assert train_alone(task, 3).samples == 12
    assert task.evaluate(task.model) is None


def test_the_function_may_have_any_name_and_its_docstring_is_the_summary(write: Write) -> None:
    file = write('def lines():\n    """Fits a line.\n\n    And more."""\n    return parts()')
    assert tasks.load(f"{file}:lines").summary == "Fits a line."


def test_workers_make_the_same_weights_from_a_file_too(write: Write) -> None:
    family = tasks.load(str(write("def make_task(): return parts()")))
    before = torch.random.get_rng_state()
    assert equal(weights(family.make(Context(1, 5))), weights(family.make(Context(2, 5))))
    assert not equal(weights(family.make(Context(1, 5))), weights(family.make(Context(1, 6))))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_file_may_import_its_neighbours_and_bear_the_name_of_a_module_of_ours(write: Write, tmp_path: Path) -> None:
    (tmp_path / "my_helper.py").write_text("lr = 0.5")
    file = write("import my_helper\ndef make_task(): return parts()").rename(tmp_path / "common.py")
    ours = sys.modules["common"]
    tasks.load(str(file)).make(Context())
    assert sys.modules["common"] is ours
    del sys.modules["task_common"]


def test_the_example_in_the_documentation_works(write: Write) -> None:
    text = str(tasks.__doc__)
    example = text[text.index("    import torch") : text.index("`data` is iterated")]
    path = write("")
    path.write_text(textwrap.dedent(example))
    family = tasks.load(str(path))
    a, b = family.make(Context(1, 0)), family.make(Context(2, 0))
    assert equal(weights(a), weights(b))
    assert not equal(list(a.batches), list(b.batches))
    start = a.loss(a.model, next(iter(a.batches))).item()
    assert train_alone(a, 200).last_loss < start / 2


# --- errors ---


@pytest.mark.parametrize(
    ("text", "function", "says"),
    [
        ("import nothing_like_it", "", r"my_task.py cannot be run, line 10: ModuleNotFoundError.*Install it for"),
        ("def make_task(:", "", r"line 10: SyntaxError"),
        ("x = 1 / 0", "", r"line 10: ZeroDivisionError: division by zero\. Correct"),
        ("raise SystemExit('usage')", "", r"line 10: SystemExit: usage\. .*__main__"),
        ("def make_tusk(): ...", "", r"no function 'make_task' \(did you mean 'make_tusk'\?\)\..*make_tusk"),
        ("def make_task(): ...", ":other", r"no function 'other'.*make_task"),
        ("make_task = 3", "", r"holds a value, but no function, named 'make_task'"),
        ("def make_task(context, depth): ...", "", r"asks for context, depth"),
        ("def make_task(*, context): ...", "", r"asks for context"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(write: Write, text: str, function: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tasks.load(f"{write(text)}{function}")
    assert "my_task" not in sys.modules or "nothing" not in text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def make_task(): ...", r"make_task in .*my_task.py returned None\. Return a worker.tasks.Task"),
        ("def make_task(): return parts()[:3]", r"returned a tuple of 3"),
        ("def make_task(): return parts()[0]", r"returned a Linear"),
        ("def make_task(): return (1, *parts()[1:])", r"model that make_task in .* returned is a int, not a torch.nn"),
        ("def make_task(): return (*parts()[:1], 1, *parts()[2:])", r"optimizer .* a int, not a torch optimizer"),
        ("def make_task(): return (*parts()[:2], None, parts()[3])", r"data .* None, not something to iterate"),
        ("def make_task(): return (*parts()[:3], parts()[0].weight)", r"loss .* a Parameter, not a function"),
        ("def make_task():\n    x = 1\n    return y", r"failed, line 12: NameError: name 'y' is not defined\. Correct"),
    ],
)
def test_a_function_that_makes_no_task_says_why(write: Write, text: str, says: str) -> None:
    family = tasks.load(str(write(text)))
    with pytest.raises(ConfigError, match=says):
        family.make(Context())


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no task file .*train\.py"):
        tasks.load(str(tmp_path / "train.py:make_task"))


def test_what_is_neither_a_name_nor_a_file_says_so() -> None:
    with pytest.raises(ConfigError, match=r"FILE\.py:FUNCTION"):
        tasks.load("train.py make_task")


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no task named 'digit' \(did you mean 'digits'\?\)\. Known: .*digits"):
        tasks.load("digit")


@pytest.mark.parametrize("batch", [torch.ones(5, 2), (torch.ones(5, 2), 1), [torch.ones(5)], {"ids": torch.ones(5, 3)}])
def test_the_samples_of_a_batch_are_the_length_of_its_first_element(batch: Any) -> None:
    assert first_length(batch) == 5


def test_nn_modules_are_what_the_network_of_digits_is_made_of() -> None:
    model = digits.network()
    assert sum(parameter.numel() for parameter in model.parameters()) == 21_386
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


# --- halves of a batch ---


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("n", [4, 7])
def test_halves_hold_every_sample_once_in_the_same_form(n: int) -> None:
    x, y = torch.arange(n), torch.arange(n) * 10
    for batch in (x, (x, y), [x, (y, x)], {"x": x, "more": [y]}, Pair(x, y)):
        found = first_halves(batch)
        assert found is not None
        a, b = found
        assert type(a) is type(b) is type(batch)
        assert (first_length(a), first_length(b)) == (n // 2, n - n // 2)
    found = first_halves((x, y))
    assert found is not None
    for i, whole in enumerate((x, y)):
        assert torch.equal(torch.cat([found[0][i], found[1][i]]), whole)


@pytest.mark.parametrize(
    "batch",
    [torch.ones(3), (torch.ones(8), torch.ones(6)), (torch.ones(8), 3), "a text", [], torch.ones(()), ["a"] * 8],
    ids=["small", "lengths", "number", "text", "empty", "scalar", "texts"],
)
def test_what_has_no_halves(batch: Any) -> None:
    assert first_halves(batch) is None
