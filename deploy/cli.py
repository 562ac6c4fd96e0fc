"""The command line: words become settings, settings become work, errors become a sentence and an exit code.

    paramserver serve | worker | launch | simulate | status | rules | codecs | tasks | replay

Laws
* Nothing is decided here: settings are made by `common.config`, their flags by `deploy.options`, a run on one machine
  by `deploy.local`, one in virtual time by `deploy.simulation`, and what a person sees by `deploy.screens`.
* `--help` reads no settings and no torch: what a command needs is imported when it runs.
* Every ParamserverError becomes `error: sentence` and `fix: what to do` on stderr and the exit code of its owner; no
  other module turns an error into an exit code. Results go to stdout, what happens meanwhile to stderr.
* Imports go one way: `cli` sees the others of `deploy`, and none of them sees `cli`.

Left out: `top`, `checkpoint`, `keygen` and `doctor`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.live import Live
from rich.markup import escape

from common.errors import ConfigError, ParamserverError, PeerError, StateError
from deploy.children import die_with, exit_on_signals
from deploy.options import Commands, load, takes_settings
from deploy.screens import Steps, Voice, closing_table, console, list_table, settings_table, status_view

if TYPE_CHECKING:
    from common.config import Loaded

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


class Program(Commands):
    """All commands. Gives their errors the exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except ParamserverError as error:
            screen = console(stderr=True)
            code = f" ({error.code.value})" if isinstance(error, PeerError) else ""
            screen.print(f"[bold red]error{code}:[/] {escape(error.sentence)}", soft_wrap=True)
            if error.fix:
                screen.print(f"  [bold]fix:[/] {escape(error.fix)}", soft_wrap=True)
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


# The commands

CONFIG = typer.Option(None, "--config", metavar="FILE", help="TOML file with settings")
PRINT_CONFIG = typer.Option(False, "--print-config", metavar="", help="show every setting and where it came from")
JSON = typer.Option(False, "--json", metavar="", help="as JSON, for scripts")
PARENT = typer.Option(None, hidden=True, help="process id of the parent that this process shall not outlive")
DATA = typer.Option(None, "--data", metavar="PATH", help="folder of data sets, for tasks that read one")
OPTIMIZER = typer.Option(
    "",
    metavar="sgd|nesterov|adamw",
    help="inner optimizer of a built-in task (default: its own choice)",
    show_default=False,
)
MECHANISM = typer.Option(
    "",
    metavar="NAME:VALUE",
    help="done to the gradient of each sample: dropconnect:P, langevin:SIGMA, quantise",
    show_default=False,
)
MODEL_SEED = typer.Option(0, metavar="N", help="start of the initial weights, the same for all workers of a run")


@takes_settings(app, "ServerSettings")
def serve(
    config: Path | None = CONFIG,
    print_config: bool = PRINT_CONFIG,
    as_json: bool = JSON,
    ready_file: Path | None = typer.Option(None, metavar="PATH", help="written when ready; holds the address"),
    die_with_parent: int | None = PARENT,
    **flags: Any,
) -> None:
    """Run the server until Ctrl-C; prints the line with which workers join."""
    die_with(die_with_parent, signal.SIGTERM)
    loaded = load("ServerSettings", config, flags)
    if print_config:
        _show_settings(loaded, as_json=as_json)
        return
    _expect_folder(ready_file)
    from paramserver import memory
    from paramserver.daemon import Daemon

    settings, voice = loaded.settings, Voice()
    differences = "differences in " if settings.replies == "difference" else ""
    codecs = f"codec {settings.codec} up and {differences}{settings.reply_codec} down"
    voice.say("info", f"Rule {settings.rule}, {codecs}.")
    voice.say("info", memory.before_the_model(settings))

    def ready(address: str) -> None:
        if ready_file is not None:
            _write(ready_file, address)
        voice.say(
            "info", f"Listening on {address}." + ("" if settings.directory else " Nothing is saved: no directory.")
        )
        join = f"Join with:\n  paramserver worker {_from_elsewhere(address)} --task digits"
        console().print(escape(join), soft_wrap=True)

    Daemon(settings, voice.say, ready).run()
    voice.say("info", "Stopped.")


@takes_settings(
    app,
    "WorkerSettings",
    only=("name", "task", "device", "group", "optimizer", "mechanism", "seed", "connect_timeout_s"),
)
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
    die_with(die_with_parent, signal.SIGKILL)
    loaded = load("WorkerSettings", config, {"address": address} | flags, by_place=("address",))
    if print_config:
        _show_settings(loaded, as_json=as_json)
        return
    _expect_folder(report)
    exit_on_signals()
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
    app,
    "ServerSettings",
    only=(
        *("rule", "rule_settings", "codec", "replies", "reply_codec", "local_steps", "overlap", "seed", "directory"),
        *("local_steps_by", "diversity_every_steps", "diversity_horizon_measurements", "diversity_delta"),
        *("budget_updates", "budget_samples", "budget_s", "arrivals", "max_arrivals_mib"),
    ),
)
def launch(
    workers: int | None = typer.Option(None, min=1, max=1024, metavar="N", help="worker processes (default 4)"),
    task: str = typer.Option("digits", metavar="TASK", help="a built-in task, or FILE.py:FUNCTION"),
    per_gpu: int | None = typer.Option(None, min=1, metavar="N", help="so many workers on each visible CUDA device"),
    data: Path | None = DATA,
    optimizer: str = OPTIMIZER,
    mechanism: str = MECHANISM,
    no_solo: bool = typer.Option(False, "--no-solo", metavar="", help="train no lone worker to compare with"),
    config: Path | None = CONFIG,
    **flags: Any,
) -> None:
    """Run a server and its workers on this machine until the budget is used up, and report."""
    loaded = load("ServerSettings", config, flags)
    from deploy import local, plan

    made = plan.make(
        loaded,
        task=task,
        workers=workers,
        per_gpu=per_gpu,
        data=data,
        optimizer=optimizer,
        mechanism=mechanism,
        solo=not no_solo,
    )
    exit_on_signals()
    voice = Voice()
    results = local.launch(made, voice.console, voice.say)
    console().print(closing_table(results))
    typer.echo(f"Report: {results['report']}")


@takes_settings(
    app,
    "ServerSettings",
    only=(
        *("rule", "rule_settings", "codec", "replies", "reply_codec", "local_steps", "overlap", "seed", "directory"),
        *("lag_weight", "lag_exponent", "max_lag", "beyond_max_lag", "max_clock_gap", "buffers", "lease_s"),
        *("local_steps_by", "diversity_every_steps", "diversity_horizon_measurements", "diversity_delta"),
        *("budget_updates", "budget_samples", "budget_s", "checkpoint_interval_s"),
    ),
)
def simulate(
    workers: int = typer.Option(4, min=1, max=10_000, metavar="N", help="simulated workers"),
    task: str = typer.Option("digits", metavar="TASK", help="a built-in task, or FILE.py:FUNCTION"),
    data: Path | None = DATA,
    optimizer: str = OPTIMIZER,
    mechanism: str = MECHANISM,
    compute: str = typer.Option("normal:100ms,10ms", metavar="DIST", help="time of one optimizer step"),
    network: str = typer.Option("lognormal:1ms,0.5", metavar="DIST", help="time of one message, one way"),
    bandwidth: float = typer.Option(0.0, min=0.0, metavar="MB/S", help="of each worker, each way; 0: no limit"),
    server_bandwidth: float = typer.Option(0.0, min=0.0, metavar="MB/S", help="of the server, each way; 0: no limit"),
    stragglers: str = typer.Option("", metavar="COUNT:FACTOR", help="slow workers, such as 1:4,10%:2"),
    faults: str = typer.Option(
        "", metavar="NAME=VALUE", help="loss, duplicate, reorder (shares); cuts, worker_crashes, server_crashes (times)"
    ),
    threads: int = typer.Option(1, min=1, metavar="N", help="of torch; another number may round otherwise"),
    evaluations: int = typer.Option(20, min=1, max=10_000, metavar="N", help="looks at the center"),
    no_solo: bool = typer.Option(False, "--no-solo", metavar="", help="train no lone worker to compare with"),
    check: bool = typer.Option(False, "--check", metavar="", help="check every invariant after every event; slow"),
    as_json: bool = JSON,
    config: Path | None = CONFIG,
    **flags: Any,
) -> None:
    """Run a server and its workers in virtual time, and report: one seed, one result, bit for bit."""
    from deploy import nursery

    nursery.start()  # it imports what workers need while this process does the same
    loaded = load("ServerSettings", config, flags)
    if loaded.settings.arrivals:
        raise ConfigError(
            f"A simulation records no arrivals, and {loaded.origins['arrivals']} asks for them.",
            fix="Leave it out: the same command and seed give the same run again.",
        )
    from deploy import plan, simulation
    from deploy.simulation import scenario

    found = scenario.make(
        workers=workers,
        compute=compute,
        network=network,
        bandwidth_mb_s=bandwidth,
        server_bandwidth_mb_s=server_bandwidth,
        stragglers=stragglers,
        faults=faults,
        evaluations=evaluations,
        check=check,
    )
    made = plan.make(
        loaded,
        task=task,
        workers=workers,
        data=data,
        optimizer=optimizer,
        mechanism=mechanism,
        solo=not no_solo,
        threads=threads,
    )
    exit_on_signals()
    voice = Voice()
    results = simulation.simulate(made, found, voice.console, voice.say)
    if as_json:
        keys = ("updates", "samples", "seconds", "center_loss", "center_accuracy", "center_sha256", "report")
        typer.echo(json.dumps({key: results[key] for key in keys}))
        return
    console().print(closing_table(results))
    typer.echo(f"SHA-256 of the center: {results['center_sha256']}")
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
    optimizer: str = OPTIMIZER,
    mechanism: str = MECHANISM,
    threads: int = typer.Option(1, min=1, metavar="N"),
    die_with_parent: int | None = PARENT,
) -> None:
    """Train a task without a server, and measure it: what `launch` compares with."""
    die_with(die_with_parent, signal.SIGKILL)
    exit_on_signals()
    from deploy.measure import train_alone

    found = train_alone(
        task,
        steps,
        device=device,
        seed=seed,
        model_seed=model_seed,
        data=data,
        threads=threads,
        optimizer=optimizer,
        mechanism=mechanism,
    )
    _write(report, json.dumps(found, indent=1))


@app.command()
def status(
    address: str = typer.Argument("tcp://127.0.0.1:5555", help="the server's, from its join line"),
    watch: bool = typer.Option(False, "--watch", metavar="", help="again every second, until Ctrl-C"),
    as_json: bool = JSON,
    timeout_s: float = typer.Option(5.0, min=0.1, metavar="SECONDS", help="give up after so long"),
) -> None:
    """Show who is at a server, how it goes, and what is waited for."""
    from common import query

    def show() -> dict[str, Any]:
        return query.status(address, timeout_s)

    if as_json:
        typer.echo(json.dumps(show()))
    elif not (watch and sys.stdout.isatty()):
        console().print(status_view(address, show()))
    else:
        with Live(status_view(address, show()), console=console(), auto_refresh=False) as live:
            while True:
                time.sleep(1)
                live.update(status_view(address, show()), refresh=True)
    while watch:
        time.sleep(1)
        typer.echo(json.dumps(show())) if as_json else console().print(status_view(address, show()))


@app.command()
def rules(
    name: str | None = typer.Argument(None, help="only this one", show_default=False), as_json: bool = JSON
) -> None:
    """List the update rules and their settings."""
    from common import config, rules

    found = [rules.load(one) for one in ([name] if name else rules.names())]
    _list(
        [
            {
                "name": rule.name,
                "summary": rule.summary,
                "paper": rule.paper,
                "settings": [
                    {
                        "name": setting,
                        "default": field.default,
                        "allowed": config.allowed(field),
                        "description": field.description,
                    }
                    for setting, field in rule.Config.model_fields.items()
                ],
            }
            for rule in found
        ],
        as_json=as_json,
    )


@app.command()
def codecs(
    name: str | None = typer.Argument(
        None, help="only this one, such as int8 or topk:0.05, or those that auto weighs", show_default=False
    ),
    as_json: bool = JSON,
) -> None:
    """List the codecs, which encode updates and replies, and when to use which."""
    from common import codecs

    found = [codecs.load(one) for one in (codecs.choices(name) if name else codecs.names())]
    _list(
        [
            {
                "name": codec.name,
                "summary": codec.summary,
                "when": codec.when,
                "bytes_per_element": codec.bytes_per_element,
                "lossless": codec.lossless,
                "unbiased": codec.unbiased,
                "feedback": codec.feedback,
                "replies": codec.carries_parameters,
                "parameters": [
                    {"name": one.name, "default": one.write(one.default), "description": one.meaning}
                    for one in codec.parameters
                ],
                "paper": codec.paper,
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


@app.command()
def replay(
    file: str | None = typer.Argument(
        None, metavar="[FILE]", help="JSON: a rule, a center and a script; - reads standard input", show_default=False
    ),
    log: Path | None = typer.Option(None, metavar="DIRECTORY", help="live a server's recorded arrivals again"),
    to: str = typer.Option("", metavar="VERSION", help="stop there, with --log", show_default=False),
    as_json: bool = JSON,
) -> None:
    """Check a rule by hand, with one line of JSON for each update of a script; or a run recorded with --arrivals."""
    if (file is None) == (log is None):
        fix = "`paramserver replay FILE` checks a rule by hand, `paramserver replay --log DIRECTORY` a recorded run."
        raise ConfigError("Give either a script or the directory of a recorded run.", fix=fix)
    if file is not None:
        if to or as_json:
            raise ConfigError("--to and --json go with --log.", fix="A script is replayed whole, and as JSON.")
        from deploy import replay as by_hand

        for line in by_hand.replay(by_hand.read(file)):
            typer.echo(line)
        return
    assert log is not None
    from deploy import arrivals

    lives = []
    for life in arrivals.replay(log, to):
        lives.append(life)
        if not as_json:
            typer.echo("\n".join(arrivals.lines(life)))
    if as_json:
        typer.echo(json.dumps(arrivals.summary(log, lives)))
    if lives[-1].apart:
        raise typer.Exit(1)


def main() -> None:
    """The program `paramserver`."""
    app(prog_name="paramserver")


# Helpers


def _show_settings(loaded: Loaded[Any], *, as_json: bool) -> None:
    from common import config

    rows = config.describe(loaded)
    if as_json:
        typer.echo(json.dumps([row._asdict() for row in rows], indent=1))
    else:
        console().print(settings_table(rows))


def _list(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """What there is: a table, or JSON."""
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        console().print(list_table(rows))


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


if __name__ == "__main__":
    main()
