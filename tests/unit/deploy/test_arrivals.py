"""`paramserver replay --log`: whatever went wrong between the cores, each life leads to the same center again.

Laws
* A replayed life ends with the live center, bit for bit, under any rule, with lost and doubled messages, workers that
  crash, a server that does, saves that fail; jobs that were cut otherwise change nothing.
* What is not as it was is told with the event at which it shows: a changed payload, time, token, order, center.
* What is missing or corrupt is said in a sentence, and the exit code is not 0.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from common.errors import ConfigError, StateError
from common.layout import center_sha256
from common.messages import Version
from common.node import JobDone, Received, Tick, Unsendable
from deploy import arrivals, cli
from paramserver.arrivals import MAGIC, Arrival, Begin, End, Record, Stopped, Torn, head, name_of, pack, read
from paramserver.checkpoint import Directory
from paramserver.core import ServerCore
from tests.cluster import Faults
from tests.recorded import RecordedCluster

ROUGH = Faults(loss=0.05, duplicate=0.1, cut_every_s=0.7)
CRASHES = Faults(cut_every_s=2.0, crash_worker_every_s=2.0, failed_saves=0.3)
CRASHES_AT_S = (1.5, 3.2)
"""When the server is killed, where it is."""


def run(*words: str) -> Any:
    return CliRunner().invoke(cli.app, ["replay", *words])


def recorded(directory: Path, seed: int = 1, faults: Faults = ROUGH, **changes: Any) -> str:
    """Logs of one cluster; the SHA-256 of its center."""
    settings = {"checkpoint_interval_s": 0.4} | changes.pop("settings", {})
    cluster = RecordedCluster(seed, directory, faults=faults, settings=settings, **changes)
    for at_s in CRASHES_AT_S if faults is CRASHES else ():
        cluster.after(at_s, cluster.crash_server)
    cluster.run()
    return cluster.end()


def records(path: Path) -> list[Any]:
    with path.open("rb") as stream:
        return list(read(stream, path.name))


def rewritten(path: Path, change: Callable[[list[Any]], None]) -> None:
    """A log with other records, whose hashes fit."""
    found: list[Record] = records(path)
    change(found)
    packed = [pack(record) for record in found]
    path.write_bytes(MAGIC + b"".join(head(one) + one[0] + b"".join(one[1]) for one in packed))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of one life in which nothing goes wrong."""
    directory = tmp_path_factory.mktemp("calm")
    recorded(directory, faults=Faults(), updates=6)
    return directory


@pytest.fixture
def copied(calm: Path, tmp_path: Path) -> Path:
    return shutil.copytree(calm, tmp_path / "copied")


# --- the same center ---


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "downpour"},
        {"rule": "gem", "codec": "int8"},
        {"rule": "gem", "rule_settings": {"variant": "self_excluded"}, "codec": "bf16", "reply_codec": "int8"},
        {"rule": "dc_asgd", "reply_codec": "fp16", "lag_weight": "polynomial", "max_lag": 2},
        {"rule": "fedbuff"},
        {"rule": "delayed_nesterov", "max_clock_gap": 2},
        {"rule": "diloco", "workers": 3},
        {"rule": "gem", "replies": "difference", "reply_codec": "natural"},
        {"rule": "diloco", "workers": 3, "replies": "difference", "reply_codec": "plain:int4"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values() if isinstance(value, str)),
)
@pytest.mark.parametrize("faults", [ROUGH, CRASHES], ids=["rough", "crashes"])
def test_every_life_leads_to_the_same_center(tmp_path: Path, settings: dict[str, Any], faults: Faults) -> None:
    sha256 = recorded(tmp_path, faults=faults, settings=settings, updates=50 if faults is CRASHES else 12)
    lives = list(arrivals.replay(tmp_path))
    assert [life.apart for life in lives] == [""] * len(list(tmp_path.iterdir()))
    assert lives[-1].sha256 == lives[-1].live_sha256 == sha256 != ""
    assert lives[-1].verdict == "Identical."
    assert all("killed" in life.verdict for life in lives[:-1])
    assert len(lives) > 1 or faults is ROUGH


def test_pushes_of_several_chunks_and_jobs_of_several_ranges(tmp_path: Path) -> None:
    sha256 = recorded(tmp_path, faults=Faults(), updates=3, guard=600_000, settings={"rule": "gem", "codec": "int8"})
    assert [life.sha256 for life in arrivals.replay(tmp_path)] == [sha256]
    ranges = [r.event.results for r in records(tmp_path / name_of(1)) if isinstance(getattr(r, "event", None), JobDone)]
    assert max(map(len, ranges)) > 1


def test_a_life_stops_at_the_version_that_is_wanted(calm: Path) -> None:
    (whole,) = arrivals.replay(calm)
    last = Version(*map(int, whole.version.split("."))).version
    for to in ("3", "1.3"):
        (life,) = arrivals.replay(calm, to)
        assert (life.version, life.updates, life.apart) == ("1.3", 3, "")
        assert life.events < whole.events
    found = list(arrivals.replay(calm, str(last)))
    assert found[0].sha256 == whole.sha256
    with pytest.raises(ConfigError, match="No recorded life reaches version 2"):
        list(arrivals.replay(calm, "2.1"))
    for wrong in ("last", "1.", "1.x", "1.2.3", "-1"):
        with pytest.raises(ConfigError, match="is no version"):
            list(arrivals.replay(calm, wrong))


def test_a_torn_end_is_cut_off_and_said(copied: Path) -> None:
    path = copied / name_of(1)
    path.write_bytes(path.read_bytes()[:-1])
    (life,) = arrivals.replay(copied)
    assert isinstance(records(path)[-1], Torn)
    assert not life.apart
    assert "of a torn record were cut off" in life.verdict
    assert arrivals.summary(copied, [life])["live_sha256"] is None


# --- what is not as it was ---


def change_payload(found: list[Any]) -> None:
    at = max(i for i, r in enumerate(found) if isinstance(r, Arrival) and pushes(r))
    frames = list(found[at].event.frames)
    values = np.frombuffer(frames[1], np.float32).copy()
    values[0] += 0.5
    frames[1] = values.tobytes()
    found[at] = replace(found[at], event=Received(found[at].event.peer, frames))


def pushes(arrival: Arrival) -> bool:
    return isinstance(arrival.event, Received) and b"push" in bytes(arrival.event.frames[0]) and arrival.now > 0.3


def change_token(found: list[Any]) -> None:
    at = next(i for i, r in enumerate(found) if isinstance(r, Arrival) and r.tokens)
    found[at] = replace(found[at], tokens=("other",))


def drop_token(found: list[Any]) -> None:
    at = next(i for i, r in enumerate(found) if isinstance(r, Arrival) and r.tokens)
    found[at] = replace(found[at], tokens=())


def add_token(found: list[Any]) -> None:
    at = next(i for i, r in enumerate(found) if isinstance(r, Arrival) and isinstance(r.event, Tick))
    found[at] = replace(found[at], tokens=("other",))


def drop_a_message(found: list[Any]) -> None:
    del found[max(i for i, r in enumerate(found) if isinstance(r, Arrival) and pushes(r))]


def swap_jobs(found: list[Any]) -> None:
    at = [i for i, r in enumerate(found) if isinstance(r, Arrival) and isinstance(r.event, JobDone)]
    found[at[2]] = replace(found[at[2]], event=JobDone(99, [None]))


def change_center(found: list[Any]) -> None:
    found[-1] = found[-1]._replace(sha256="00")


def claim_a_failure(found: list[Any]) -> None:
    found[9] = replace(found[9], raised="ValueError")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (change_payload, "Apart at event .* of life 1, the end of a job .push .* it led to something else .* Ack"),
        (change_token, "Apart at event 3 of life 1, Hello of .* Welcome"),
        (drop_token, "it begins a session, and the live server did not"),
        (add_token, "Apart at event .* Tick, .* the live server began a session here"),
        (drop_a_message, "Apart at event .* of life 1"),
        (swap_jobs, "that job does not run"),
        (change_center, "Apart at the end of life 1: every event led to"),
        (claim_a_failure, "the live server failed here with ValueError, and it does not now"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_not_as_it_was_is_told(copied: Path, change: Callable[[list[Any]], None], sentence: str) -> None:
    rewritten(copied / name_of(1), change)
    found = run("--log", str(copied))
    assert found.exit_code == 1
    (life,) = arrivals.replay(copied)
    assert life.apart
    assert life.verdict in found.stdout
    assert re.search(sentence, life.verdict), life.verdict


def test_a_defect_is_met_again(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose core raised raises there again, which is what one wants to look at."""

    def raised(error: str) -> Callable[[list[Any]], None]:
        def fail(found: list[Any]) -> None:
            del found[10:]
            found[9] = replace(found[9], event=Unsendable(b"", "x"), raised=error, left=0)
            found.append(Stopped("the server failed: it broke."))

        return fail

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("it broke")

    monkeypatch.setattr(ServerCore, "_unsendable", broken)
    rewritten(copied / name_of(1), raised("ZeroDivisionError"))
    (life,) = arrivals.replay(copied)
    assert life.verdict == "Identical as far as it goes: recording stopped: the server failed: it broke."
    rewritten(copied / name_of(1), raised("KeyError"))
    (life,) = arrivals.replay(copied)
    assert life.apart.endswith("ZeroDivisionError: it broke")


def test_a_corrupt_log_is_told_with_its_place(copied: Path) -> None:
    path = copied / name_of(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = run("--log", str(copied))
    assert found.exit_code == StateError.exit_code
    assert "arrivals-1.log is corrupt: record" in " ".join(found.stderr.split())


# --- several lives ---


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Logs of several lives, each of which goes on from a checkpoint of one before."""
    directory = tmp_path_factory.mktemp("crashed")
    recorded(directory, faults=CRASHES, settings={"rule": "gem"}, updates=100)
    assert len(list(directory.iterdir())) == 3
    return directory


def begin_of(path: Path) -> Begin:
    found = records(path)[0]
    assert isinstance(found, Begin)
    return found


def test_without_its_log_a_life_goes_on_from_the_checkpoint_in_the_directory(crashed: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(crashed, tmp_path / "copied")
    second = begin_of(directory / name_of(2))
    assert second.recovered is not None
    again = arrivals._Again(begin_of(directory / name_of(1)), None, kept := {}, [second.recovered])
    again.live(directory / name_of(1), None)
    (directory / name_of(1)).unlink()
    found = run("--log", str(directory))
    assert found.exit_code == StateError.exit_code
    said = " ".join(found.stderr.split())
    assert f"checkpoint {second.recovered}, from which life 2 went on" in said
    assert "arrivals-1.log" in said

    held = Directory.open(directory)
    saved = kept[second.recovered]
    held.save(second.recovered, saved.arrays, saved.record, keep=9)
    lives = list(arrivals.replay(directory))
    assert lives[0].epoch == 2
    assert lives[-1].verdict == "Identical."

    shutil.rmtree(next(directory.glob("checkpoint-*")))
    saved.arrays["center"][0] += 1.0
    held.save(second.recovered, saved.arrays, saved.record, keep=9)
    held.close()
    with pytest.raises(StateError, match="is not the checkpoint"):
        list(arrivals.replay(directory))


def test_another_checkpoint_than_the_live_one_is_told(crashed: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(crashed, tmp_path / "copied")
    rewritten(directory / name_of(2), lambda found: found.__setitem__(0, found[0]._replace(fingerprint="00")))
    lives = list(arrivals.replay(directory))
    assert [bool(life.apart) for life in lives] == [False, True]
    assert "the start of life 2: checkpoint" in lives[-1].apart


# --- the command ---


def test_the_command_prints_lives_and_exits_with_0(calm: Path) -> None:
    found = run("--log", str(calm))
    assert found.exit_code == 0
    end = records(calm / name_of(1))[-1]
    assert isinstance(end, End)
    assert found.stdout.count(end.sha256) == 2
    assert "Identical." in found.stdout


def test_as_json(calm: Path) -> None:
    found = json.loads(run("--log", str(calm), "--json").stdout)
    end = records(calm / name_of(1))[-1]
    assert found["identical"] is True
    assert found["sha256"] == found["live_sha256"] == end.sha256
    assert found["lives"][0]["events"] == found["events"] == len(records(calm / name_of(1))) - 2
    assert found["version"] == str(end.version)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "either a script or the directory"),
        (("case.json", "--log", "state"), "either a script or the directory"),
        (("case.json", "--to", "3"), "--to and --json go with --log"),
        (("case.json", "--json"), "--to and --json go with --log"),
        (("--log", "/nowhere"), "cannot be read"),
        (("--log", "."), "There is no log of arrivals"),
    ],
)
def test_what_makes_no_sense_is_refused(
    words: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(*words)
    assert found.exit_code == ConfigError.exit_code
    said = " ".join(found.stderr.split())
    assert sentence in said
    assert "fix:" in said


def test_a_server_without_a_directory_refuses_to_record(tmp_path: Path) -> None:
    found = CliRunner().invoke(cli.app, ["serve", "--arrivals"])
    assert found.exit_code == ConfigError.exit_code
    assert "Give it a --directory" in " ".join(found.stderr.split())


def test_a_renamed_log_is_refused(copied: Path) -> None:
    (copied / name_of(1)).rename(copied / name_of(2))
    with pytest.raises(StateError, match=r"arrivals-2\.log is no log of that life"):
        list(arrivals.replay(copied))


def test_logs_without_a_record_are_told(tmp_path: Path) -> None:
    (tmp_path / name_of(1)).write_bytes(MAGIC[:3])
    with pytest.raises(StateError, match="holds a whole record"):
        list(arrivals.replay(tmp_path))


def test_the_hash_is_that_of_little_endian_float32() -> None:
    center = np.array([1.5, -2.0], np.float32)
    assert center_sha256(center) == center_sha256(center.astype(">f4").view(">f4")) == center_sha256(center[::1])
    assert center_sha256(center) != center_sha256(-center)
