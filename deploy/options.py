"""Flags made of settings: each from its field, so flag, file and environment never disagree.

    @takes_settings(app, "ServerSettings", only=("rule", "codec"))
    def launch(config: Path | None = CONFIG, **flags: Any) -> None: ...      registers a command
    loaded = load("ServerSettings", config, flags)                           in it: all layers, checked

Laws
* `--help` reads no settings: the flags of a command are made when that command is named, and the model of its settings
  is known by name until then.
* A flag's value stays text: settings read and refuse it, in their own words.
* A setting that is given by its place, not by a flag, says so wherever its origin is told.

Left out: the commands, and which of them takes what (`deploy.cli`); what settings mean and allow (`common.config`).
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import typer
from rich.markup import escape
from typer.core import TyperGroup

from common.errors import ConfigError

if TYPE_CHECKING:
    from common.config import Loaded, Settings

F = TypeVar("F", bound=Callable[..., None])


class Commands(TyperGroup):
    """All commands. Gives one its flags when it is named."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the words name, and the words that are left."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, complete(str(name)) if name in _TAKES_SETTINGS else command, rest


_TAKES_SETTINGS: dict[str, tuple[Callable[..., None], str, Collection[str]]] = {}
"""Command -> its function, the model of its settings, and the names of those it takes (none: all)."""


def takes_settings(app: typer.Typer, model: str, only: Collection[str] = ()) -> Callable[[F], F]:
    """Register a command that takes `**flags`: those of the settings `model` of `common.config`, all or `only` some.

    The `app` must be one of `Commands`.
    """

    def register(function: F) -> F:
        _TAKES_SETTINGS[function.__name__] = (function, model, only)
        app.command(function.__name__)(_with_parameters(function, ()))
        return function

    return register


def complete(name: str) -> Any:
    """The command `name` with a flag for each of its settings."""
    function, model, only = _TAKES_SETTINGS[name]
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    alone.command(name)(_with_parameters(function, _flags(model, only)))
    return typer.main.get_command(alone)


def load(model: str, file: Path | None, flags: Mapping[str, Any], *, by_place: Collection[str] = ()) -> Loaded[Any]:
    """The settings of a command from all layers; raises ConfigError. Of `flags`, those `by_place` are its arguments."""
    from common import config

    told = {f"flag {config.flag(name)}": f"argument {name.upper()}" for name in by_place}
    try:
        loaded = config.load(getattr(config, model), file=file, environ=os.environ, flags=flags)
    except ConfigError as error:
        sentence = error.sentence
        for flag, argument in told.items():
            sentence = sentence.replace(f"({flag})", f"({argument})")
        raise ConfigError(sentence, fix=error.fix) from None
    return config.Loaded(loaded.settings, {name: told.get(origin, origin) for name, origin in loaded.origins.items()})


def _with_parameters(function: Callable[..., None], more: Iterable[inspect.Parameter]) -> Any:
    """The function with these parameters in place of its `**flags`."""

    @functools.wraps(function)
    def wrapper(**values: Any) -> None:
        function(**values)

    own = inspect.signature(function, eval_str=True).parameters.values()
    kept = [
        parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in own if parameter.kind != parameter.VAR_KEYWORD
    ]
    vars(wrapper)["__signature__"] = inspect.Signature([*kept, *more])
    return wrapper


def _flags(model_name: str, only: Collection[str]) -> Iterator[inspect.Parameter]:
    """One parameter per setting. Whatever is given stays text: settings read and refuse it in their own words."""
    from common import config

    model: type[Settings] = getattr(config, model_name)
    for name, field in model.model_fields.items():
        if only and name not in only:
            continue
        kind, flag = get_origin(field.annotation) or field.annotation, config.flag(name)
        default = ", ".join(field.default) if kind is tuple else field.default
        notes = [limits] if (limits := config.allowed(field).partition(", ")[2]) and kind is not tuple else []
        notes += [] if field.default is None or kind is dict else [f"default {default}".lower()]
        notes += ["may be repeated"] if kind in (tuple, dict) else []
        option = typer.Option(
            None,
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            help=escape(f"{field.description}{' (' + '; '.join(notes) + ')' if notes else ''}"),
            metavar="" if kind is bool else _metavar(name, field.annotation),
            show_default=False,
        )
        annotation: Any = bool | None if kind is bool else list[str] | None if kind in (tuple, dict) else str | None
        yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _metavar(name: str, annotation: Any) -> str:
    """What stands behind a flag in the help: its unit, or its kind."""
    units = {"_s": "SECONDS", "_h": "HOURS", "_mib": "MIB"}
    unit = next((unit for end, unit in units.items() if name.endswith(end)), "")
    kinds = {get_origin(annotation) or annotation, *get_args(annotation)}
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    named = {int: "N", float: "NUMBER", Path: "PATH", tuple: "ADDRESS", dict: "NAME=VALUE"}
    return unit or next((word for kind, word in named.items() if kind in kinds), "TEXT")
