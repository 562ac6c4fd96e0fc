"""The command line: words become settings, settings become work, errors become a sentence and an exit code.

    paramserver serve | worker | launch | status | rules | codecs | tasks

Laws
* Nothing is decided here: settings are made by `common.config`, a run on one machine by `deploy.local`.
* Each flag of a setting is made from its field, so flag, file and environment never disagree.
* `--help` reads no settings and no torch: the flags of a command are made when that command is named, and what it
  needs is imported when it runs.
* Every ParamserverError becomes `error: sentence` and `fix: what to do` on stderr and the exit code of its owner; no
  other module turns an error into an exit code. Results go to stdout, what happens meanwhile to stderr.

Left out: `top`, `simulate`, `checkpoint`, `keygen` and `doctor`.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import typer
from typer.core import TyperGroup

from common.errors import ConfigError, ParamserverError, StateError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from common.config import Loaded, Settings

F = TypeVar("F", bound=Callable[..., None])

EXIT_CODES = {
    0: "done",
    1: "something else failed",
    2: "a flag, a setting or a task is wrong",
    3: "what lies on the disk cannot be used",
    4: "another server has the directory",
    5: "a kernel failed; the server goes on from its checkpoint",
    6: "nobody answers, or the port is taken",
    7: "the other side refused",
    130: "stopped by Ctrl-C",
    143: "stopped by SIGTERM",
}
INTERVAL_S, LINE_INTERVAL_S = 0.2, 5.0
"""How often progress is shown: in a terminal, and as plain lines."""
WIDE_COLUMNS = 200
"""Of a table that nobody watches, such as one in a pipe."""
PR_SET_PDEATHSIG = 1
"""Of Linux' prctl: the signal this process gets when its parent dies."""


# Flags made of settings


class Program(TyperGroup):
    """All commands. Gives one its flags when it is named, and its errors their exit codes."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the words name, and the words that are left."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, _complete(str(name)) if name in _TAKES_SETTINGS else command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except ParamserverError as error:
            console = _console(stderr=True)
            console.print(f"[bold red]error:[/] {_escape(error.sentence)}", soft_wrap=True)
            if error.fix:
                console.print(f"  [bold]fix:[/] {_escape(error.fix)}", soft_wrap=True)
            raise typer.Exit(error.exit_code) from None


app = typer.Typer(
    name="paramserver",
    cls=Program,
    help="Asynchronous PyTorch training through a parameter server.",
    epilog="Exit codes: " + "; ".join(f"[bold]{code}[/] {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

_TAKES_SETTINGS: dict[str, tuple[Callable[..., None], str, Collection[str]]] = {}
"""Command -> its function, the model of its settings, and the names of those it takes (none: all)."""


def takes_settings(model: str, only: Collection[str] = (), **options: Any) -> Callable[[F], F]:
    """Register a command that takes `**flags`: those of the settings `model` of `common.config`, all or `only` some."""

    def register(function: F) -> F:
        _TAKES_SETTINGS[function.__name__] = (function, model, only)
        app.command(function.__name__, **options)(_with_parameters(function, ()))
        return function

    return register


def _complete(name: str) -> Any:
    """The command `name` with a flag for each of its settings."""
    function, model, only = _TAKES_SETTINGS[name]
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
    alone.command(name)(_with_parameters(function, _flags(model, only)))
    return typer.main.get_command(alone)


def _with_parameters(
    function: Callable[..., None], more: Sequence[inspect.Parameter] | Iterator[inspect.Parameter]
) -> Any:
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
            help=_escape(f"{field.description}{' (' + '; '.join(notes) + ')' if notes else ''}"),
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


def _load(model: str, file: Path | None, flags: Mapping[str, Any]) -> Loaded[Any]:
    from common import config

    return config.load(getattr(config, model), file=file, environ=os.environ, flags=flags)


# The commands

CONFIG = typer.Option(None, "--config", metavar="FILE", help="TOML file with settings")
PRINT_CONFIG = typer.Option(False, "--print-config", metavar="", help="show every setting and where it came from")
JSON = typer.Option(False, "--json", metavar="", help="as JSON, for scripts")
PARENT = typer.Option(None, hidden=True, help="process id of the parent that this process shall not outlive")
DATA = typer.Option(None, "--data", metavar="PATH", help="folder of data sets, for tasks that read one")
MODEL_SEED = typer.Option(0, metavar="N", help="start of the initial weights, the same for all workers of a run")


@takes_settings("ServerSettings")
def serve(
    config: Path | None = CONFIG,
    print_config: bool = PRINT_CONFIG,
    as_json: bool = JSON,
    ready_file: Path | None = typer.Option(None, metavar="PATH", help="written when ready; holds the address"),
    die_with_parent: int | None = PARENT,
    **flags: Any,
) -> None:
    """Run the server until Ctrl-C; prints the line with which workers join."""
    _die_with(die_with_parent, signal.SIGTERM)
    loaded = _load("ServerSettings", config, flags)
    if print_config:
        _show_settings(loaded, as_json=as_json)
        return
    _expect_folder(ready_file)
    from paramserver import memory
    from paramserver.daemon import Daemon

    settings, voice = loaded.settings, Voice()
    voice.say("info", f"Rule {settings.rule}, codec {settings.codec} up and {settings.reply_codec} down.")
    voice.say("info", memory.before_the_model(settings))

    def ready(address: str) -> None:
        if ready_file is not None:
            _write(ready_file, address)
        voice.say(
            "info", f"Listening on {address}." + ("" if settings.directory else " Nothing is saved: no directory.")
        )
        join = f"Join with:\n  paramserver worker {_from_elsewhere(address)} --task digits"
        _console().print(_escape(join), soft_wrap=True)

    Daemon(settings, voice.say, ready).run()
    voice.say("info", "Stopped.")


@takes_settings("WorkerSettings", only=("name", "task", "device", "seed", "connect_timeout_s"))
def worker(
    address: str | None = typer.Argument(None, help="the server's, from its join line", show_default=False),
    config: Path | None = CONFIG,
    print_config: bool = PRINT_CONFIG,
    as_json: bool = JSON,
    data: Path | None = DATA,
    model_seed: int = MODEL_SEED,
    threads: int | None = typer.Option(None, min=1, metavar="N", help="threads of torch; without, one per core"),
    report: Path | None = typer.Option(None, metavar="FILE", help="written at the end: what this worker did, JSON"),
    die_with_parent: int | None = PARENT,
    **flags: Any,
) -> None:
    """Run one worker until the server's budget is used up. Ctrl-C says goodbye to the server."""
    _die_with(die_with_parent, signal.SIGKILL)
    loaded = _load("WorkerSettings", config, {"address": address} | flags)
    if print_config:
        _show_settings(loaded, as_json=as_json)
        return
    _expect_folder(report)
    _exit_on_signals()
    voice = Voice()
    logging.getLogger("paramserver").addHandler(voice)
    logging.getLogger("paramserver").setLevel(logging.INFO)
    from worker import loop

    with Steps(voice) as steps:
        done = loop.run(loaded.settings, model_seed=model_seed, data=data, threads=threads, on_step=steps.show)
    row = asdict(done) | {"device": loaded.settings.device, "seed": loaded.settings.seed}
    if report is not None:
        _write(report, json.dumps(row, indent=1))
    voice.say(
        "info",
        f"{done.name}: {done.steps:,} steps, {done.samples:,} samples, {done.samples_per_s:,.0f} samples/s, "
        f"{done.exchanges.pushed:,} updates taken, {done.exchanges.rejected} refused.",
    )


@takes_settings(
    "ServerSettings",
    only=(
        *("rule", "rule_settings", "codec", "reply_codec", "local_steps", "overlap", "seed", "directory"),
        *("budget_updates", "budget_samples", "budget_s"),
    ),
)
def launch(
    workers: int | None = typer.Option(None, min=1, max=1024, metavar="N", help="worker processes (default 4)"),
    task: str = typer.Option("digits", metavar="TASK", help="a built-in task, or FILE.py:FUNCTION"),
    per_gpu: int | None = typer.Option(None, min=1, metavar="N", help="so many workers on each visible CUDA device"),
    data: Path | None = DATA,
    no_solo: bool = typer.Option(False, "--no-solo", metavar="", help="train no lone worker to compare with"),
    config: Path | None = CONFIG,
    **flags: Any,
) -> None:
    """Run a server and its workers on this machine until the budget is used up, and report."""
    loaded = _load("ServerSettings", config, flags)
    from deploy import local

    plan = local.plan(loaded, task=task, workers=workers, per_gpu=per_gpu, data=data, solo=not no_solo)
    _exit_on_signals()
    voice = Voice()
    results = local.launch(plan, voice.console, voice.say)
    _console().print(local.closing_table(results))
    typer.echo(f"Report: {results['report']}")


@app.command(hidden=True)
def alone(
    steps: int = typer.Option(..., min=1, metavar="N"),
    report: Path = typer.Option(..., metavar="FILE"),
    task: str = typer.Option("digits", metavar="TASK"),
    device: str = typer.Option("cpu", metavar="TEXT"),
    seed: int = typer.Option(0, metavar="N"),
    model_seed: int = MODEL_SEED,
    data: Path | None = DATA,
    threads: int = typer.Option(1, min=1, metavar="N"),
    die_with_parent: int | None = PARENT,
) -> None:
    """Train a task without a server, and measure it: what `launch` compares with."""
    _die_with(die_with_parent, signal.SIGKILL)
    _exit_on_signals()
    from deploy import local

    found = local.train_alone(task, steps, device=device, seed=seed, model_seed=model_seed, data=data, threads=threads)
    _write(report, json.dumps(found, indent=1))


@app.command()
def status(
    address: str = typer.Argument("tcp://127.0.0.1:5555", help="the server's, from its join line"),
    watch: bool = typer.Option(False, "--watch", metavar="", help="again every second, until Ctrl-C"),
    as_json: bool = JSON,
    timeout_s: float = typer.Option(5.0, min=0.1, metavar="SECONDS", help="give up after so long"),
) -> None:
    """Show who is at a server, how it goes, and what is waited for."""
    from rich.live import Live

    from common import query

    def show() -> dict[str, Any]:
        return query.status(address, timeout_s)

    if as_json:
        typer.echo(json.dumps(show()))
    elif not (watch and sys.stdout.isatty()):
        _console().print(_status(address, show()))
    else:
        with Live(_status(address, show()), console=_console(), auto_refresh=False) as live:
            while True:
                time.sleep(1)
                live.update(_status(address, show()), refresh=True)
    while watch:
        time.sleep(1)
        typer.echo(json.dumps(show())) if as_json else _console().print(_status(address, show()))


@app.command()
def rules(as_json: bool = JSON) -> None:
    """List the update rules and their settings."""
    from common import config, rules

    found = [rules.load(name) for name in rules.names()]
    _list(
        [
            {
                "name": rule.name,
                "summary": rule.summary,
                "paper": rule.paper,
                "settings": [
                    {
                        "name": name,
                        "default": field.default,
                        "allowed": config.allowed(field),
                        "description": field.description,
                    }
                    for name, field in rule.Config.model_fields.items()
                ],
            }
            for rule in found
        ],
        as_json=as_json,
    )


@app.command()
def codecs(as_json: bool = JSON) -> None:
    """List the codecs, which encode updates and replies."""
    from common import codecs

    found = [codecs.load(name) for name in codecs.names()]
    _list(
        [
            {
                "name": codec.name,
                "summary": codec.summary,
                "paper": codec.paper,
                "bytes_per_element": codec.bytes_per_element,
                "lossless": codec.lossless,
                "unbiased": codec.unbiased,
            }
            for codec in found
        ],
        as_json=as_json,
    )


@app.command()
def tasks(as_json: bool = JSON) -> None:
    """List the built-in tasks."""
    from worker import tasks

    _list([{"name": name, "summary": tasks.load(name).summary} for name in tasks.names()], as_json=as_json)


# Processes


def _die_with(parent: int | None, number: signal.Signals) -> None:
    """Have the kernel send this process `number` when `parent` dies; end at once where it is dead already."""
    if parent is None:
        return
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != parent:
        raise typer.Exit(1)


def _exit_on_signals() -> None:
    """SIGTERM and a closed terminal end the process as Ctrl-C does: blocks are left, peers are told."""

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)


def _write(path: Path, text: str) -> None:
    """The whole text or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error.strerror}.", fix="Choose another place.") from None


def _expect_folder(path: Path | None) -> None:
    """Better told now than when there is something to write."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"{path} cannot be written: its folder is not there.", fix=f"Make {path.parent} first.")


def _from_elsewhere(address: str) -> str:
    """An address to dial: a wildcard becomes this machine's name."""
    import socket

    return address.replace("//0.0.0.0:", f"//{socket.gethostname()}:").replace("//[::]:", f"//{socket.gethostname()}:")


# What a person sees


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    class Patient(Console):
        """One that goes on when nobody reads any more: a closed pipe stops no server."""

        def on_broken_pipe(self) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    console = Patient(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = WIDE_COLUMNS
    return console


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


class Voice(logging.Handler):
    """Sentences with the time of day, on stderr; in colour where somebody watches."""

    STYLES = {"warning": "yellow", "error": "bold red"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.console = _console(stderr=True)

    def say(self, level: str, sentence: str) -> None:
        """One sentence; `level` is info, warning or error."""
        style = self.STYLES.get(level)
        text = f"[{style}]{level}:[/] {_escape(sentence)}" if style else _escape(sentence)
        self.console.print(f"[dim]{datetime.now():%H:%M:%S}[/] {text}", soft_wrap=True)

    def emit(self, record: logging.LogRecord) -> None:
        """A line of the log."""
        self.say(record.levelname.lower(), record.getMessage())


class Steps:
    """The progress of one worker: a line that changes in a terminal, else a line every few seconds."""

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._status = voice.console.status("joining") if voice.console.is_terminal else None
        self._interval_s = INTERVAL_S if self._status else LINE_INTERVAL_S
        self._due_s = 0.0

    def __enter__(self) -> Steps:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._status is not None:
            self._status.stop()

    def show(self, step: int, loss: Any, samples_per_s: float, session: Any) -> None:
        """After each step; nearly all of them show nothing."""
        now = time.monotonic()
        if now < self._due_s:
            return
        self._due_s = now + self._interval_s
        e = session.exchanges
        done = max(e.pushed + e.rejected, 1)
        line = (
            f"step {step:,} · loss {float(loss):.4f} · {samples_per_s:,.0f} samples/s · version {session.version} · "
            f"stalled {1000 * e.stalled_s / done:.1f} ms, {100 * e.hidden / done:.0f} % hidden · "
            f"{size(e.bytes_up)} up, {size(e.bytes_down)} down"
        )
        if self._status is not None:
            self._status.update(_one_line(line))
        else:
            self._voice.say("info", line)


def _one_line(words: str) -> Text:
    """Cut where the terminal ends."""
    from rich.text import Text

    return Text(words, no_wrap=True, overflow="ellipsis")


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column.endswith(" ") else "left")
    return table


def _show_settings(loaded: Loaded[Any], *, as_json: bool) -> None:
    from common import config

    rows = config.describe(loaded)
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=1))
        return
    table = _table("setting", "value", "from", "meaning")
    for row in rows:
        value = ", ".join(row.value) if isinstance(row.value, list) else "" if row.value is None else str(row.value)
        table.add_row(row.name, _escape(value), _escape(row.origin), _escape(row.description))
    _console().print(table)


def _list(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """What there is: a table, or JSON."""
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = _table(*(name.replace("_", " ") for name in rows[0]))
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
        table.add_section()
    _console().print(table)


def _cell(value: Any) -> str:
    match value:
        case bool():
            return "yes" if value else "no"
        case list():
            return (
                "\n".join(_escape(f"{one['name']} = {one['default']}: {one['description']}") for one in value) or "none"
            )
        case _:
            return _escape(str(value))


def _status(address: str, found: Mapping[str, Any]) -> RenderableType:
    """A server's answer: what it is doing, its workers, and what it waits for."""
    from rich.console import Group

    rule = f"{found['rule']}, {found['local_steps']} local steps, {found['codec']} up and {found['reply_codec']} down"
    durable = "none" if found["durable"] == "0.0" else found["durable"]
    lines = [
        f"[bold]{_escape(address)}[/]: {_escape(found['phase'])}"
        + (f", {_escape(found['finished'])}" if found["finished"] else ""),
        f"{_escape(rule)}; {found['parameters']:,} parameters, {size(found['memory_bytes'])}",
        f"version {found['epoch']}.{found['version']}, on the disk {durable}; {found['updates']:,} updates "
        f"({found['updates_per_s']:,.1f}/s), {found['samples']:,} samples ({found['samples_per_s']:,.0f}/s), "
        f"{100 * found['budget_used']:.0f} % of the budget",
    ]
    columns = (
        "worker",
        "state",
        "updates ",
        "refused ",
        "steps ",
        "samples ",
        "loss ",
        "lag ",
        "up ",
        "down ",
        "seen ",
    )
    table = _table(*columns)
    for w in found["workers"]:
        counts = (f"{w[name]:,}" for name in ("updates", "rejected", "steps", "samples"))
        loss = "" if w["loss"] is None else f"{w['loss']:.4f}"
        traffic = (size(w["bytes_up"]), size(w["bytes_down"]), f"{w['last_seen_s']:.1f} s")
        table.add_row(_escape(w["name"]), w["state"], *counts, loss, str(w["lag"]), *traffic)
    waits = [f"[yellow]waiting for[/] {_escape(sentence)}" for sentence in found["waiting_for"]]
    return Group(*lines, *([table] if found["workers"] else []), *waits)


def main() -> None:
    """The program `paramserver`."""
    app(prog_name="paramserver")


if __name__ == "__main__":
    main()
