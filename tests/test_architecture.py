"""The house keeps its laws: who may import whom, what pure modules may not touch, what is banned everywhere.

Laws
* Imports are read with `ast`, wherever they stand in a file; nothing is imported to be checked.
* Each check is a function from one parsed module to the sentences about what is wrong with it, and each is shown a
  bad module that it must find and a good one that it must pass.
* A pure module that the architecture names and that does not exist is an error: a renamed file must not leave its
  law behind.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "paramserver", "worker", "deploy")
OURS = (*PACKAGES, "benchmarks")

MAY_IMPORT = {
    "common": {"common"},
    "paramserver": {"common", "paramserver"},
    "worker": {"common", "worker"},
    "deploy": {"common", "paramserver", "worker", "deploy", "benchmarks"},
    "benchmarks": {"common", "paramserver", "worker", "benchmarks"},
}

PURE = (
    *(f"common.{name}" for name in ("errors", "discovery", "messages", "fields", "wire", "layout", "node")),
    *(f"paramserver.{name}" for name in ("shard", "session", "core")),
    *(f"worker.{name}" for name in ("session", "events", "core")),
)
# Those above must exist. These may be cut anew, and a module whose first line ends in "Pure." is pure without a list.
PURE_WHERE_PRESENT = (
    *(f"common.{name}" for name in ("buffers", "chunks", "kernels")),
    *(f"paramserver.{name}" for name in ("budget", "downlink", "intake", "memory", "order", "slots", "snapshots")),
    *(f"paramserver.{name}" for name in ("applying", "durability", "initial", "joining", "pulls", "state", "status")),
    "paramserver.uplink",
)
PURE_PACKAGES = ("common.rules", "common.codecs")
IMPURE = {"asyncio", "zmq", "socket", "threading", "time", "random", "os", "logging"}

HELPERS_OF_ALGORITHMS = {f"common.{name}" for name in ("buffers", "discovery", "errors", "kernels")}  # of a `base`
RULE_HELPERS = {"common.rules.base", "common.rules.elastic", "common.rules.rounds"}
CODEC_HELPERS = {f"common.codecs.{name}" for name in ("base", "draws", "parts", "tensors")}

SPEAKS_TO_ITSELF = {"deploy.simulation.pipe"}
"""Exchanges Python objects with processes that it forked, over pipes that nobody else can reach."""
WRITES_FUNCTIONS = {"common.fields"}
"""Runs source that it made, at import, of the names and types of our own dataclasses; nothing received is in it."""
UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@dataclass(frozen=True, slots=True)
class Module:
    """One parsed file; `imports` are pairs of line and absolute dotted name."""

    name: str
    tree: ast.Module
    imports: tuple[tuple[int, str], ...]

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


Check = Callable[[Module], list[str]]


# --- the checks ---


def directions(module: Module) -> list[str]:
    """`deploy` > `paramserver`, `worker` > `common`; nobody imports `deploy`, and nobody imports the tests."""
    allowed = MAY_IMPORT[module.package]
    return [
        f"{module.name}:{line} imports {name}; {module.package} sees of ours only {', '.join(sorted(allowed))}"
        for line, name in module.imports
        if name.partition(".")[0] in {*OURS, "tests"} - allowed
    ]


def algorithms_alone(module: Module) -> list[str]:
    """A rule sees of ours only its base and the rounds, a codec only its base; a base sees only the plain helpers."""
    allowed = allowed_to_algorithm(module.name)
    if allowed is None:
        return []
    return [
        f"{module.name}:{line} imports {name}; of ours it may import only {', '.join(sorted(allowed))}"
        for line, name in module.imports
        if name.partition(".")[0] in OURS and name not in allowed
    ]


def allowed_to_algorithm(name: str) -> set[str] | None:
    """What a module in `common.rules` or `common.codecs` may import of ours; None for any other module."""
    for package, helpers in (("common.rules", RULE_HELPERS), ("common.codecs", CODEC_HELPERS)):
        if name == package:
            return HELPERS_OF_ALGORITHMS | helpers
        if name == f"{package}.base":
            return HELPERS_OF_ALGORITHMS
        if name.startswith(f"{package}."):
            return helpers - {name}
    return None


def purity(module: Module) -> list[str]:
    """Time, randomness and the outside world reach a pure module as arguments."""
    if not is_pure(module):
        return []
    return [
        f"{module.name}:{line} is pure and imports {name}"
        for line, name in module.imports
        if name.partition(".")[0] in IMPURE
    ]


def is_pure(module: Module) -> bool:
    inside = any(module.name == package or module.name.startswith(f"{package}.") for package in PURE_PACKAGES)
    first_line = (ast.get_docstring(module.tree) or "").partition("\n")[0]
    return inside or module.name in {*PURE, *PURE_WHERE_PRESENT} or first_line.endswith("Pure.")


def safe_kernels(module: Module) -> list[str]:
    """No `fastmath` (isfinite(NaN) becomes true), no `parallel=True` (two threads abort the process)."""
    found = []
    for name, value in settings(module.tree):
        off = isinstance(value, ast.Constant) and value.value is False
        if name in {"fastmath", "parallel"} and not off:
            found.append(f"{module.name}:{value.lineno} sets {name}")
    return found


def settings(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Every `name=value` of a call and every `"name": value` of a dict that may become one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg, node.value
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value, value


def nothing_received_is_executed(module: Module) -> list[str]:
    """No pickle, marshal, torch.load, eval or exec, under any name; but pickle alone where a program speaks to itself,
    and exec alone where it writes functions of its own."""
    if module.package not in PACKAGES:
        return []
    found = [
        f"{module.name}:{line} imports {name}"
        for line, name in module.imports
        if (name.partition(".")[0] in UNSAFE_MODULES and not (name == "pickle" and module.name in SPEAKS_TO_ITSELF))
        or name in {"torch.load", "builtins.eval", "builtins.exec"}
    ]
    banned = {"eval"} if module.name in WRITES_FUNCTIONS else {"eval", "exec"}
    called = {"torch": {"load"}, "builtins": {"eval", "exec"}}
    aliases = {name: name for name in called} | import_aliases(module.tree)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and node.id in banned:
            found.append(f"{module.name}:{node.lineno} uses {node.id}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = aliases.get(node.value.id, "")
            if node.attr in called.get(owner, ()):
                found.append(f"{module.name}:{node.lineno} uses {owner}.{node.attr}")
    for name, value in settings(module.tree):
        if name == "allow_pickle" and not (isinstance(value, ast.Constant) and value.value is False):
            found.append(f"{module.name}:{value.lineno} sets allow_pickle")
    return found


def import_aliases(tree: ast.AST) -> dict[str, str]:
    """Local name -> module, for every `import module as name`."""
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import))
    return {alias.asname: alias.name for node in imports for alias in node.names if alias.asname}


def says_what_it_is(module: Module) -> list[str]:
    """A file opens with what it is."""
    return [] if (ast.get_docstring(module.tree) or "").strip() else [f"{module.name} has no docstring"]


CHECKS: tuple[Check, ...] = (
    directions,
    algorithms_alone,
    purity,
    safe_kernels,
    nothing_received_is_executed,
    says_what_it_is,
)


# --- reading the house ---


def parse(name: str, source: str, *, known: frozenset[str], is_package: bool = False) -> Module:
    """`known` are the names of all our modules: they tell `from package import module` from a name in a package."""
    tree = ast.parse(source, filename=name)
    package = name if is_package else name.rpartition(".")[0]
    return Module(name, tree, tuple(read_imports(tree, package, known)))


def read_imports(tree: ast.AST, package: str, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = absolute(node, package)
            for alias in node.names:
                full = f"{source}.{alias.name}"
                ours = source.partition(".")[0] in {*OURS, "tests"}
                yield node.lineno, source if ours and full not in known else full
        elif isinstance(node, ast.Call) and (name := imported_by_call(node)):
            yield node.lineno, name


def absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def imported_by_call(node: ast.Call) -> str:
    """The module that `import_module("...")` or `__import__("...")` names, else nothing."""
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    argument = node.args[0] if node.args else None
    if function in {"import_module", "__import__"} and isinstance(argument, ast.Constant):
        return str(argument.value)
    return ""


def files() -> dict[str, Path]:
    """Dotted name -> file, for every module of ours."""
    found = {}
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@pytest.fixture(scope="module")
def house() -> list[Module]:
    found = files()
    known = frozenset(found)
    return [
        parse(name, path.read_text(encoding="utf-8"), known=known, is_package=path.name == "__init__.py")
        for name, path in found.items()
    ]


# --- the house as it is ---


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_the_law(house: list[Module], check: Check) -> None:
    found = [sentence for module in house for sentence in check(module)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("name", [*PURE, "common.kernels", "common.rules.base", "common.codecs.base"])
def test_a_module_named_here_exists(name: str) -> None:
    assert name in files(), f"{name} is named in this test and does not exist; after a rename, rename it here too"


@pytest.mark.parametrize("package", OURS)
def test_a_package_has_modules_and_every_folder_of_it_is_one(package: str) -> None:
    folders = {path.parent for name, path in files().items() if name.partition(".")[0] == package}
    assert folders, f"{package} holds no module"
    bare = [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").is_file()]
    assert not bare, f"without __init__.py, and so left out of an installed copy: {', '.join(bare)}"


# --- the checks themselves ---

KNOWN = frozenset({"common", "common.rules", "common.rules.base", "common.wire", "deploy", "deploy.cli", "worker"})

BAD = [
    (directions, "common.wire", "import paramserver.core"),
    (directions, "common.wire", "def late():\n    from worker import core"),
    (directions, "paramserver.core", "from worker.session import Session"),
    (directions, "worker.core", "import importlib\nimportlib.import_module('paramserver.core')"),
    (directions, "benchmarks.roundtrip", "from deploy import cli"),
    (directions, "worker.loop", "from tests.helpers import thing"),
    (algorithms_alone, "common.rules.gem", "from common.wire import encode"),
    (algorithms_alone, "common.rules.gem", "from common import errors, wire"),
    (algorithms_alone, "common.rules.gem", "from common.kernels import kernel"),
    (algorithms_alone, "common.rules.gem", "from .downpour import apply"),
    (algorithms_alone, "common.rules.base", "from common.rules.rounds import close"),
    (algorithms_alone, "common.rules.rounds", "from common.kernels import kernel"),
    (algorithms_alone, "common.rules.gem", "from common.rules import names"),
    (algorithms_alone, "common.codecs.int8", "from common.rules.base import Rule"),
    (algorithms_alone, "common.codecs.feedback", "from common.codecs.int8 import encode"),
    *((purity, "common.wire", f"import {name}") for name in sorted(IMPURE)),
    (purity, "common.rules.gem", "from os import path"),
    (purity, "paramserver.core", "def late():\n    from asyncio import sleep"),
    (purity, "worker.session", "import logging.handlers as handlers"),
    (purity, "paramserver.slots", "if True:\n    import time as clock"),
    (purity, "worker.anchor", "'''Where a merge left off. Pure.'''\nimport random"),
    (safe_kernels, "common.kernels", "numba.njit(fastmath=True)"),
    (safe_kernels, "common.kernels", "numba.njit(fastmath={'nnan'})"),
    (safe_kernels, "common.codecs.int8", "@njit(parallel=True)\ndef f(): ..."),
    (safe_kernels, "benchmarks.kernels", "options = {'parallel': True}\nnumba.njit(**options)"),
    (nothing_received_is_executed, "common.wire", "import pickle"),
    (nothing_received_is_executed, "common.wire", "from marshal import loads"),
    (nothing_received_is_executed, "worker.loop", "import torch\ntorch.load(path, weights_only=True)"),
    (nothing_received_is_executed, "deploy.simulation.cores", "import pickle"),
    (nothing_received_is_executed, "deploy.simulation.pipe", "import marshal\neval('1')"),
    (nothing_received_is_executed, "worker.loop", "import torch as t\nt.load(path)"),
    (nothing_received_is_executed, "worker.loop", "from torch import load"),
    (nothing_received_is_executed, "deploy.cli", "eval('1')"),
    (nothing_received_is_executed, "deploy.cli", "run = exec"),
    (nothing_received_is_executed, "common.wire", "exec(source, names)"),
    (nothing_received_is_executed, "common.fields", "eval('1')"),
    (nothing_received_is_executed, "deploy.cli", "import builtins as b\nb.eval('1')"),
    (nothing_received_is_executed, "paramserver.core", "numpy.load(path, allow_pickle=True)"),
    (says_what_it_is, "common.wire", "x = 1"),
    (says_what_it_is, "common.wire", ""),
]

GOOD = [
    (directions, "common.wire", "import numpy\nfrom common.errors import WireError"),
    (directions, "paramserver.core", "from common import wire\nfrom paramserver.shard import Shard"),
    (directions, "deploy.cli", "import paramserver.daemon, worker.loop, common.wire"),
    (algorithms_alone, "common.rules.gem", "import math\nimport numpy\nfrom common.rules import base"),
    (algorithms_alone, "common.rules.local_sgd", "from common.rules.rounds import close\nfrom .base import Rule"),
    (algorithms_alone, "common.rules.base", "from common.errors import UsageError\nfrom common.kernels import kernel"),
    (algorithms_alone, "common.codecs.feedback", "from common.codecs.base import Codec"),
    (algorithms_alone, "common.wire", "from common.rules.gem import apply"),
    (purity, "common.wire", "import struct\nfrom common import timeline"),
    (purity, "paramserver.daemon", "import asyncio, zmq, logging, os, time"),
    (safe_kernels, "common.kernels", "'''fastmath and parallel=True are banned'''\nnumba.njit(parallel=False)"),
    (nothing_received_is_executed, "worker.loop", "model.eval()\njson.load(f)\nspec.loader.exec_module(m)"),
    (nothing_received_is_executed, "benchmarks.roundtrip", "import pickle"),
    (nothing_received_is_executed, "common.fields", "exec(source, names)"),
    (nothing_received_is_executed, "deploy.simulation.pipe", "import pickle"),
    (says_what_it_is, "common.wire", "'''Bytes.'''"),
]


@pytest.mark.parametrize(("check", "name", "source"), BAD)
def test_a_check_finds_what_is_bad(check: Check, name: str, source: str) -> None:
    assert check(parse(name, source, known=KNOWN))


@pytest.mark.parametrize(("check", "name", "source"), GOOD)
def test_a_check_passes_what_is_good(check: Check, name: str, source: str) -> None:
    assert check(parse(name, source, known=KNOWN)) == []


def test_every_check_has_been_seen_to_fail_and_to_pass() -> None:
    assert {check for check, *_ in BAD} == {check for check, *_ in GOOD} == set(CHECKS)
