"""The command line: each setting is a flag, each error a sentence and an exit code, and help costs nothing."""

from __future__ import annotations

import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from common import codecs, config, errors, rules
from common.config import ServerSettings, Settings, WorkerSettings
from common.errors import Code, ParamserverError, PeerError
from common.messages import Diversity, Scalars
from deploy import cli, options, plan
from deploy.screens import WIDE_COLUMNS, status_view
from paramserver import status
from paramserver.checkpoint import Directory
from tests.cluster import Desk
from worker import tasks

ROOT = Path(__file__).resolve().parents[3]
LISTS = {"rules": rules.names, "codecs": codecs.names, "tasks": tasks.names}


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Commands that run for long take SIGTERM for themselves."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(*words: str, **environ: str) -> Any:
    return CliRunner().invoke(cli.app, words, env=environ)


def every_error() -> Iterator[type[ParamserverError]]:
    yield from (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ParamserverError))


def made(kind: type[ParamserverError]) -> ParamserverError:
    if kind in (errors.WireError, errors.CodecError):
        return kind("It [red]broke.")
    if issubclass(kind, PeerError):
        return kind(Code.LIMIT, "It [red]broke.", fix="Mend it.")
    return kind("It [red]broke.", fix="Mend it.")


# --- help ---


def test_help_names_every_command_and_exit_code() -> None:
    found = run("--help", COLUMNS="200")
    assert found.exit_code == 0
    for word in ("serve", "worker", "launch", "status", "rules", "codecs", "tasks", *cli.EXIT_CODES.values()):
        assert word in " ".join(found.stdout.split())
    assert "alone" not in found.stdout


def test_every_error_has_a_documented_exit_code() -> None:
    assert {kind.exit_code for kind in every_error()} <= set(cli.EXIT_CODES)


def test_help_imports_nothing_heavy_and_takes_less_than_half_a_second() -> None:
    code = """
import resource, sys
from deploy.cli import app
try:
    app(["--help"])
except SystemExit:
    pass
heavy = {"torch", "numba", "numpy", "pydantic", "zmq", "common.config"} & set(sys.modules)
used = resource.getrusage(resource.RUSAGE_SELF)
print("HEAVY", sorted(heavy), used.ru_utime + used.ru_stime)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy, _, seconds = done.stdout.rpartition("HEAVY ")[2].rpartition(" ")
    assert heavy == "[]"
    assert float(seconds) < 0.5


@pytest.mark.parametrize("command", ["serve", "worker", "launch", "status", "rules", "codecs", "tasks"])
def test_each_command_has_help(command: str) -> None:
    assert run(command, "--help").exit_code == 0


@pytest.mark.parametrize(("command", "model"), [("serve", ServerSettings), ("worker", WorkerSettings)])
def test_every_setting_is_a_flag(command: str, model: type[Settings]) -> None:
    flags = {option: one for one in options.complete(command).params for option in one.opts}
    for name, field in model.model_fields.items():
        if name != "address":  # which is the argument
            assert str(field.description).partition(";")[0] in flags[config.flag(name)].help


def test_a_wrong_flag_names_the_nearest() -> None:
    found = run("serve", "--codek", "int8")
    assert found.exit_code == 2
    assert "--codec" in found.stderr


# --- settings ---


def test_print_config_shows_where_each_setting_came_from(tmp_path: Path) -> None:
    file = tmp_path / "ps.toml"
    file.write_text('rule = "gem"\nlease_s = 5\n[rule_settings]\nkappa = 2.0\n')
    words = ("serve", "--print-config", "--json", "--config", str(file), "--set", "mu=0.5", "--lease-s", "7")
    found = run(*words, "--bind=tcp://127.0.0.1:1", "--bind=tcp://127.0.0.1:2", PARAMSERVER_LOCAL_STEPS="4")
    assert found.exit_code == 0
    rows = {row["name"]: (row["value"], row["origin"]) for row in json.loads(found.stdout)}
    assert rows["rule"] == ("gem", f"file {file}")
    assert rows["rule_settings.kappa"] == (2.0, f"file {file}")
    assert rows["rule_settings.mu"] == (0.5, "flag --set")
    assert rows["lease_s"] == (7, "flag --lease-s")
    assert rows["local_steps"] == (4, "environment PARAMSERVER_LOCAL_STEPS")
    assert rows["bind"] == (["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"], "flag --bind")
    assert rows["codec"] == ("fp32", "default")


def test_print_config_is_a_table_for_people() -> None:
    found = run("worker", "tcp://127.0.0.1:1", "--print-config", "--device", "cuda:1")
    assert found.exit_code == 0
    line = next(line for line in found.stdout.splitlines() if "device" in line)
    assert line.split()[:4] == ["device", "cuda:1", "flag", "--device"]


def test_an_address_given_by_its_place_is_no_flag() -> None:
    rows = json.loads(run("worker", "tcp://127.0.0.1:1", "--print-config", "--json").stdout)
    assert {row["name"]: row["origin"] for row in rows}["address"] == "argument ADDRESS"
    rows = json.loads(run("worker", "--print-config", "--json", PARAMSERVER_ADDRESS="tcp://127.0.0.1:1").stdout)
    assert {row["name"]: row["origin"] for row in rows}["address"] == "environment PARAMSERVER_ADDRESS"


def test_what_launch_passes_on_gives_the_same_settings() -> None:
    given: dict[str, Any] = {
        "bind": ["tcp://127.0.0.1:0"],
        "rule": "gem",
        "rule_settings": {"kappa": 2.0, "variant": "paper", "any_optimizer": True},
        "codec": "int8",
        "overlap": True,
        "adopt": False,
        "local_steps": 1,
        "budget_s": 2.5,
        "directory": "a b/-c",
    }
    settings = ServerSettings.model_validate(given)
    found = run("serve", *plan.words_of(settings), "--print-config", "--json", PARAMSERVER_LOCAL_STEPS="9")
    rows = {row["name"]: row for row in json.loads(found.stdout)}
    loaded = config.Loaded(settings, {})
    assert {name: row["value"] for name, row in rows.items()} == {
        row.name: row.value for row in config.describe(loaded)
    }
    assert {name for name, row in rows.items() if row["origin"].startswith("flag")} >= set(given) - {"rule_settings"}


# --- errors ---


@pytest.mark.parametrize("command", ["serve", "launch"])
def test_an_unknown_rule_names_the_nearest(command: str) -> None:
    found = run(command, "--rule", "gemm")
    assert found.exit_code == 2
    assert found.stdout == ""
    assert "error: There is no rule named 'gemm' (did you mean 'gem'?)" in found.stderr
    assert "\n  fix: Known: " in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize("kind", list(every_error()), ids=lambda kind: kind.__name__)
def test_each_error_becomes_a_sentence_and_the_exit_code_of_its_owner(
    kind: type[ParamserverError], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise made(kind)

    monkeypatch.setattr(rules, "names", fail)
    found = run("rules")
    assert found.exit_code == kind.exit_code
    assert found.stdout == ""
    code = getattr(made(kind), "code", None)
    assert found.stderr.splitlines()[0] == f"error{f' ({code.value})' if code else ''}: It [red]broke."
    assert ("  fix: Mend it." in found.stderr) == bool(made(kind).fix)


def test_a_simulation_refuses_to_record_arrivals() -> None:
    done = run("simulate", PARAMSERVER_ARRIVALS="true")
    assert done.exit_code == 2
    assert "PARAMSERVER_ARRIVALS" in done.stderr


def test_an_empty_directory_is_refused() -> None:
    done = run("simulate", "--directory", "")
    assert done.exit_code == 2
    assert "directory is empty" in done.stderr


def test_runs_that_start_in_the_same_second_have_directories_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = config.load(ServerSettings, file=None, environ={}, flags={"rule": "downpour"})
    made = [plan.make(loaded, task="digits", workers=1, solo=False).directory for _ in range(3)]
    assert len(set(made)) == 3
    assert all(directory.is_dir() for directory in made)


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(errors.StateError, match="No directory can be made"):
        plan.make(config.load(ServerSettings, file=None, environ={}, flags={}), task="digits", workers=1, solo=False)


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rules, "names", interrupt)
    assert run("rules").exit_code == 130


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        found = run("status", f"tcp://127.0.0.1:{free.getsockname()[1]}", "--timeout-s", "0.2")
    assert found.exit_code == 6
    assert "fix: " in found.stderr


@pytest.mark.parametrize(("address", "why"), [("tcp://*:5555", "to bind"), ("nowhere", "(argument ADDRESS)")])
def test_an_address_that_nobody_can_dial(address: str, why: str) -> None:
    found = run("worker", address)
    assert found.exit_code == 2
    assert why in found.stderr
    assert "--address" not in found.stderr


@pytest.mark.parametrize("words", [("--task", "digit"), ("--task", "no_file.py"), ("--per-gpu", "2")])
def test_launch_refuses_before_anything_is_started(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan.torch.cuda, "device_count", lambda: 0)
    found = run("launch", *words)
    assert found.exit_code == 2
    assert "error: " in found.stderr
    assert list(tmp_path.iterdir()) == []


def test_launch_leaves_a_directory_alone_that_another_server_has(tmp_path: Path) -> None:
    (tmp_path / "address").write_text("tcp://127.0.0.1:1")
    held = Directory.open(tmp_path)
    try:
        found = run("launch", "--directory", str(tmp_path))
    finally:
        held.close()
    assert found.exit_code == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["address", "lock"]


def test_per_gpu_spreads_workers_over_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.torch.cuda, "device_count", lambda: 2)
    assert plan._devices(None, 2) == ("cuda:0", "cuda:1", "cuda:0", "cuda:1")
    with pytest.raises(errors.ConfigError, match="makes 4 workers on 2 devices"):
        plan._devices(3, 2)


def test_a_report_that_could_not_be_written_is_refused_at_once(tmp_path: Path) -> None:
    found = run("worker", "tcp://127.0.0.1:1", "--report", str(tmp_path / "no" / "report.json"))
    assert found.exit_code == 2
    assert "folder" in found.stderr


def test_a_child_whose_parent_died_meanwhile_ends_at_once() -> None:
    words = [sys.executable, "-m", "deploy", "serve", "--die-with-parent", str(2**31 - 1)]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, timeout=60).returncode == 1


# --- lists ---


@pytest.mark.parametrize("what", LISTS)
def test_a_list_names_all_there_is(what: str) -> None:
    found = run(what, "--json")
    assert found.exit_code == 0
    rows = json.loads(found.stdout)
    assert tuple(row["name"] for row in rows) == LISTS[what]()
    assert all(row["summary"] for row in rows)
    table = run(what).stdout
    assert all(row["name"] in table for row in rows)


def test_rules_lists_papers_and_settings() -> None:
    rows = {row["name"]: row for row in json.loads(run("rules", "--json").stdout)}
    assert "1805.08469" in rows["gem"]["paper"]
    settings = {one["name"]: one for one in rows["gem"]["settings"]}
    assert settings["kappa"]["default"] == 1.0
    assert "above 0" in settings["kappa"]["allowed"]
    assert "kappa = 1.0" in run("rules").stdout


def test_status_says_whether_more_workers_can_help() -> None:
    desk = Desk(local_steps=4, local_steps_by="diversity")
    hand = desk.join()
    [push] = hand.pieces(1)
    hand.send(type(push)(push.begin, Scalars(0.5, 32, 1, 0.1, Diversity(1.0, 9.0, 1)), push.payload))  # type: ignore[union-attr, call-arg]
    found = status.describe(desk.core, desk.now)
    paper = io.StringIO()
    Console(width=WIDE_COLUMNS, file=paper).print(status_view("tcp://here:1", found))
    shown = paper.getvalue()
    assert found["diversity"]["sentence"] in shown
    assert "hardly help: B = 32 samples in flight (1 worker x 32 samples x 1 step)" in shown
    assert "4 local steps by diversity" in shown
