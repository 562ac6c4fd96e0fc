"""Tasks by name, and a user's own from a file.

    tasks.load("digits")                   what lies in this folder
    tasks.load("train.py:make_task")       a function in a file of yours; without a name it is `make_task`

Such a file is complete with one function that returns model, optimizer, data and loss:

    import torch
    from torch.nn import functional

    def make_task(context):
        generator = torch.Generator().manual_seed(context.seed)  # each worker its own order
        x = torch.randn(1000, 20)  # the same for all: made under context.model_seed
        y = (x.sum(1) > 0).long()
        data = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x, y), batch_size=32, shuffle=True, generator=generator
        )
        model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
        model.to(context.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss(model, batch):
            x, y = (part.to(context.device) for part in batch)
            return functional.cross_entropy(model(x), y)

        return model, optimizer, data, loss

`data` is iterated again whenever it ends. The function may do without the context, and may return a `Task` instead,
which also knows how to evaluate a model. It runs with torch's random numbers started from `context.model_seed`, so
that all workers make the same weights; while training they are started from `context.seed`.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from common import discovery
from common.errors import ConfigError, ParamserverError
from worker.tasks.base import OPTIMIZERS, Context, Task, TaskFamily

__all__ = ["OPTIMIZERS", "Context", "Task", "TaskFamily", "load", "names"]

HELPERS = ("base", "images", "labelled", "pooled")
DEFAULT_FUNCTION = "make_task"
_FILE = re.compile(r"(?P<file>.+\.py)(:(?P<function>\w*))?")
_RESULT = "Return a worker.tasks.Task, or the four of model, optimizer, data, loss."


def names() -> tuple[str, ...]:
    """Names of the built-in tasks, sorted."""
    return discovery.names(__name__, helpers=HELPERS)


def load(text: str) -> TaskFamily:
    """The built-in task of that name, or the one in the file FILE.py:FUNCTION, which is run for it.

    Raises ConfigError that says what there is, or what is wrong in the file and where.
    """
    if match := _FILE.fullmatch(text):
        return _from_file(text, Path(match["file"]).expanduser(), match["function"] or DEFAULT_FUNCTION)
    if ".py" in text:
        raise ConfigError(f"'{text}' is neither a task nor FILE.py:FUNCTION.", fix="Such as train.py:make_task.")
    family: TaskFamily = discovery.load(__name__, text, attribute="TASK", kind="task", helpers=HELPERS)
    return family


def _from_file(name: str, file: Path, function_name: str) -> TaskFamily:
    if not file.is_file():
        raise ConfigError(f"There is no task file {file}.", fix=f"Looked in {Path.cwd()}; check the path.")
    path = file.resolve()
    module = _run(path, file)
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value) and not key.startswith("_")]
        wrong = "holds no function" if function is None else "holds a value, but no function, named"
        raise ConfigError(
            f"{file} {wrong} '{function_name}'{discovery.nearest(function_name, known)}.",
            fix=f"Its functions: {', '.join(known) or 'none'}. Name one as {file}:FUNCTION.",
        )
    call = _call(function, f"{function_name} in {file}")
    summary = (inspect.getdoc(function) or "").partition("\n")[0] or f"a task of your own, from {file}"

    def make(context: Context) -> Task:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.model_seed)
            try:
                made = call(context)
            except ParamserverError:
                raise
            except Exception as error:
                raise _failure(error, path, f"{function_name} in {file} failed") from error
        return _task(made, f"{function_name} in {file}")

    return TaskFamily(name, summary, make)


def _run(path: Path, shown: Path) -> ModuleType:
    """The file as a module, its own folder on the path, as when python runs it."""
    taken = sys.modules.get(path.stem)
    name = path.stem if taken is None or getattr(taken, "__file__", None) == str(path) else f"task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _failure(error, path, f"The task file {shown} cannot be run") from error
    return module


def _failure(error: BaseException, path: Path, what: str) -> ConfigError:
    """What went wrong in a user's own file, with the line there."""
    if isinstance(error, SystemExit):
        fix = "Put what is not for workers under `if __name__ == '__main__':`."
    elif isinstance(error, ModuleNotFoundError):
        fix = f"Install it for {sys.executable}, or put the module beside the file."
    else:
        fix = "Correct that line."
    if isinstance(error, SyntaxError) and error.filename == str(path):
        line, message = error.lineno, error.msg
    else:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line, message = lines[-1] if lines else None, str(error)
    where = f", line {line}" if line else ""
    return ConfigError(f"{what}{where}: {type(error).__name__}: {message}".rstrip(" .:") + ".", fix=fix)


def _call(function: Callable[..., Any], what: str) -> Callable[[Context], Any]:
    """The function as one of the context, which it may do without."""
    given = inspect.signature(function).parameters.values()
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [one for one in given if one.default is one.empty and one.kind not in several]
    if len(required) == 1 and required[0].kind is not required[0].KEYWORD_ONLY:
        return function
    if required:
        raise ConfigError(
            f"{what} asks for {', '.join(one.name for one in required)}; a task is made from one context or none.",
            fix="Make it `def make_task(context):` and give the others defaults.",
        )
    if any(one.name == "context" for one in given):
        return lambda context: function(context=context)
    return lambda context: function()


def _task(made: Any, what: str) -> Task:
    """A Task of what the function returned; raises ConfigError where it is neither form of one."""
    if isinstance(made, tuple) and len(made) == 4:
        model, optimizer, batches, loss = made
        made = Task(model, optimizer, batches, loss)
    if not isinstance(made, Task):
        size = f" of {len(made)}" if isinstance(made, tuple) else ""
        raise ConfigError(f"{what} returned {_kind(made)}{size}.", fix=_RESULT)
    wanted = (
        ("model", made.model, "a torch.nn.Module", isinstance(made.model, torch.nn.Module)),
        ("optimizer", made.optimizer, "a torch optimizer", isinstance(made.optimizer, torch.optim.Optimizer)),
        ("data", made.batches, "something to iterate over", hasattr(made.batches, "__iter__")),
        ("loss", made.loss, "a function (model, batch) -> scalar tensor", callable(made.loss)),
    )
    for name, value, kind, right in wanted:
        if not right:
            raise ConfigError(f"The {name} that {what} returned is {_kind(value)}, not {kind}.", fix=_RESULT)
    return made


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
