"""Cases are ways times codecs, and peers; what memory does not hold together is measured apart; and one real run."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from benchmarks import harness, players, roundtrip
from benchmarks.__main__ import main
from benchmarks.harness import Case
from benchmarks.players import MB, WAYS

PEERS = ["4 x numpy.copyto", "gloo send+recv", "torch.distributed.rpc"]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(players, "has_ray", lambda: False)


def names(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


# Cases


def test_names_carry_way_codec_and_peer() -> None:
    found = roundtrip.cases(5, [WAYS["shm"], WAYS["tcp"]], ["fp32", "int8"])
    assert names(found) == [
        "paramserver shm fp32",
        "paramserver tcp fp32",
        "paramserver shm int8",
        "paramserver tcp int8",
        *PEERS,
    ]
    assert [case.peer for case in found] == [False] * 4 + [True] * 3
    assert {(case.size_bytes, case.moved_bytes) for case in found} == {(5 * MB, 10 * MB)}


def test_with_ray_it_is_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(players, "has_ray", lambda: True)
    assert names(roundtrip.cases(1, [], [])) == [*PEERS, "Ray actor"]


# Who is measured with whom


def test_where_there_is_room_all_take_turns() -> None:
    cases = roundtrip.cases(1, [WAYS["ipc"], WAYS["tcp"]], ["fp32"])
    assert harness.groups(cases, sum(case.needs_bytes for case in cases)) == [cases]


def test_where_there_is_not_each_of_ours_has_the_peers_that_fit() -> None:
    cases = roundtrip.cases(1, [WAYS["ipc"], WAYS["tcp"]], ["fp32"])
    ours, _, _, gloo, _ = (case.needs_bytes for case in cases)
    found = harness.groups(cases, ours + 2 * MB + gloo)
    assert [names(group) for group in found] == [[name, *PEERS[:2]] for name in names(cases[:2])]


def test_who_does_not_fit_alone_is_not_measured() -> None:
    cases = roundtrip.cases(1, [WAYS["ipc"]], ["fp32"])
    assert harness.groups(cases, cases[0].needs_bytes - 1) == []
    assert [names(group) for group in harness.groups(cases[1:], 4 * MB)] == [PEERS[:1], PEERS[1:2]]


def test_this_machine_has_memory() -> None:
    assert harness.free_bytes() > 2**20


def test_a_pool_holds_as_many_exchanges_as_it_should() -> None:
    one, two = (players.pool_mib(25_000_000, exchanges) for exchanges in (1, 2))
    assert one == pytest.approx(4 * 100e6 / 2**20, abs=1)
    assert two - one == pytest.approx(2 * 100e6 / 2**20, abs=1)
    assert players.pool_mib(25_000_000, 1, "int8", "bf16") < one / 2


# The command


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_round_trip_of_1_mb_in_every_codec_against_all_peers(tmp_path: Path) -> None:
    file = tmp_path / "roundtrip.json"
    with pytest.raises(SystemExit) as end:
        main(["roundtrip", "--sizes", "1", "--rounds", "2", "--json", str(file)])
    assert end.value.code == 0
    found = json.loads(file.read_text())["rows"]
    ours = {f"paramserver {way} {codec}" for way in ("ipc", "tcp") for codec in roundtrip.CODECS}
    assert ours | set(PEERS) <= {row["case"] for row in found}
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in found)
    assert multiprocessing.active_children() == []
