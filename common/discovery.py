"""One algorithm, one file: what lies in a package is what there is.

A file that does not start with an underscore and is not a shared helper offers one value under a fixed name
(`RULE`, `CODEC`, `TASK`); the file's name is the algorithm's name in settings, on the wire and in the docs.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Collection
from typing import Any

from common.errors import ConfigError


@functools.cache
def names(package: str, *, helpers: tuple[str, ...]) -> tuple[str, ...]:
    """Names of all algorithms in `package`, sorted; `helpers` are its modules that hold none."""
    path = importlib.import_module(package).__path__
    found = (module.name for module in pkgutil.iter_modules(path))
    return tuple(sorted(name for name in found if name not in helpers and not name.startswith("_")))


def load(package: str, name: str, *, attribute: str, kind: str, helpers: tuple[str, ...]) -> Any:
    """The value `attribute` of the module `package.name`; an unknown name lists the nearest and all there are."""
    known = names(package, helpers=helpers)
    if name not in known:
        raise ConfigError(
            f"There is no {kind} named '{name}'{nearest(name, known)}.", fix=f"Known: {', '.join(known)}."
        )
    return getattr(importlib.import_module(f"{package}.{name}"), attribute)


def nearest(name: str, known: Collection[str]) -> str:
    """A half sentence that names the closest of `known`, or nothing where none is close."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
