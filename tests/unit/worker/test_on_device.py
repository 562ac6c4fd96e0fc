"""Vectors on a device, which is torch's CPU: where they are chosen, what is sent when, whose memory is whose."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from common import rules
from common.binding import Binding, layout_of
from common.chunks import Plan, plan
from common.codecs.base import U8
from common.errors import CodecError, UsageError
from common.messages import NOWHERE, Scalars
from worker import on_device
from worker.driver import Carrier
from worker.events import Encoded, PushWanted
from worker.lanes import Arrival, CpuLane, lane_of
from worker.on_device import DeviceVectors, vectors_of
from worker.vectors import HostVectors, Vectors

SCALARS = Scalars(0.0, 1, 1, 0.1)
CPU = torch.device("cpu")


class Listener(Carrier):
    """Keeps what is posted, and of each piece what lay in the staging when it was said to be ready."""

    on_any_thread = True

    def __init__(self) -> None:
        self.posted: list[Any] = []
        self.ready: list[bytes] = []

    def post(self, event: Any) -> None:
        self.posted.append(event)
        if isinstance(event, Encoded):
            self.ready.append(self.wanted[-1].data.tobytes())

    @property
    def wanted(self) -> list[PushWanted]:
        return [event for event in self.posted if isinstance(event, PushWanted)]

    def news(self, timeout_s: float | None = 0.0) -> Any | None:
        return None

    def close(self, timeout_s: float) -> None:
        pass


class SlowLane(CpuLane):
    """Copies that arrive when they are let; where updates land is other memory than the staging."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.may = threading.Event()
        self.may.set()
        self.up = self.arrived_above = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Arrival:
        kept, lane = source.clone(), self

        class Late:
            def synchronize(self) -> None:
                assert lane.may.wait(20.0)
                target.copy_(kept)

        class Noted:
            def __init__(self, number: int) -> None:
                self.number = number

            def synchronize(self) -> None:
                lane.arrived_above = self.number

        if target.dtype == torch.uint8:
            return Late()
        super().copy(target, source)
        self.up += 1
        return Noted(self.up)

    def landing(self, memory: U8) -> torch.Tensor:
        return torch.zeros(len(memory), dtype=torch.uint8)


class Bench:
    """A model of three chunks, its vectors, and a staging."""

    def __init__(self, make: Callable[[Binding], Vectors], codec: str = "fp32") -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Linear(700, 1000)
        self.binding = Binding(self.model, layout_of(self.model))
        self.vectors = make(self.binding)
        self.up: Plan = plan(self.binding.layout, codec)
        self.staging = np.zeros(self.up.bytes, np.uint8)
        self.carrier = Listener()
        rule = rules.load("downpour")
        config = rules.configure(rule, {})
        self.vectors.adopt(rule, config, [{self.up.codec: self.up}], self.staging, average_buffers=True)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def push(self) -> None:
        self.vectors.work_out(self.up, self.optimizer)
        self.vectors.push(self.carrier, self.up, SCALARS, NOWHERE, 0, 0)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "PIECE_CHUNKS", 1)


def on(lane: CpuLane) -> Callable[[Binding], Vectors]:
    return lambda binding: DeviceVectors(binding, lane)


def test_a_model_in_host_memory_has_its_vectors_there() -> None:
    model = torch.nn.Linear(2, 3)
    binding = Binding(model, layout_of(model))
    assert binding.device == CPU
    assert type(vectors_of(binding)) is HostVectors
    assert type(vectors_of(binding, CPU)) is DeviceVectors


@pytest.mark.parametrize(("device", "words"), [(None, "several devices"), (torch.device("mps"), "type mps")])
def test_where_a_device_will_not_do_it_is_said(
    device: torch.device | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = torch.nn.Linear(2, 3)
    binding = Binding(model, layout_of(model))
    binding.device = device
    with caplog.at_level(logging.INFO, "paramserver.worker"):
        assert type(vectors_of(binding)) is HostVectors
    assert [words in record.message for record in caplog.records] == [True]


def test_there_are_no_lanes_to_other_devices() -> None:
    with pytest.raises(UsageError, match="of type mps"):
        lane_of(torch.device("mps"))


def test_a_model_on_two_devices_lies_on_none() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2, device="meta"))
    assert Binding(model, layout_of(model)).device is None


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk"])
def test_pieces_are_sent_in_order_once_they_are_there(codec: str) -> None:
    host, device = Bench(HostVectors, codec), Bench(on(SlowLane()), codec)
    for bench in (host, device):
        bench.push()
        bench.vectors.close()
    chunks = len(device.up.chunks)
    assert [type(event) for event in device.carrier.posted] == [PushWanted, *chunks * [Encoded]]
    assert [event.ready for event in device.carrier.posted if isinstance(event, Encoded)] == [*range(1, chunks + 1)]
    known = host.staging.tobytes()
    assert known == device.staging.tobytes()
    assert any(known)
    for chunk, seen in zip(device.up.chunks, device.carrier.ready, strict=True):
        assert seen[: chunk.offset + chunk.size] == known[: chunk.offset + chunk.size]


@pytest.mark.parametrize("codec", ["fp32", "ef:int8"])
def test_nothing_is_sent_of_what_cannot_be_encoded(codec: str) -> None:
    bench = Bench(on(SlowLane()), codec)
    with torch.no_grad():
        bench.model.bias[-1] = torch.nan
    with pytest.raises(CodecError, match="NaN or infinity"):
        bench.push()
    assert not bench.carrier.posted
    with torch.no_grad():
        bench.model.bias[-1] = 0.0
    bench.push()
    bench.vectors.close()
    assert bench.carrier.posted[-1] == Encoded(len(bench.up.chunks))


def test_the_caller_waits_for_no_copy_but_the_staging_is_not_written_to_before() -> None:
    lane = SlowLane()
    bench = Bench(on(lane))
    lane.may.clear()
    bench.push()
    assert [type(event) for event in bench.carrier.posted] == [PushWanted]
    with torch.no_grad():
        bench.model.weight += 1.0
    again = threading.Thread(target=bench.push)
    again.start()
    again.join(0.2)
    assert again.is_alive()
    assert not bench.staging.any()
    lane.may.set()
    again.join(20.0)
    bench.vectors.close()
    kinds = [type(event) for event in bench.carrier.posted]
    assert kinds == 2 * [PushWanted, *len(bench.up.chunks) * [Encoded]]


def test_what_the_courier_fails_at_is_raised() -> None:
    bench = Bench(on(SlowLane()))

    def failing(event: Any) -> None:
        if isinstance(event, Encoded):
            raise RuntimeError("the courier fell")

    bench.carrier.post = failing  # type: ignore[method-assign]
    bench.push()
    bench.vectors.close()
    with pytest.raises(RuntimeError, match="fell"):
        bench.vectors.check()


def test_replies_land_where_the_last_one_went_up_from() -> None:
    bench = Bench(on(CpuLane(CPU)))
    bench.push()
    values = np.random.default_rng(1).standard_normal(bench.binding.layout.elements, dtype=np.float32)
    known = values.copy()
    bench.vectors.merge(values, bench.up.part, moved=False)
    bench.push()
    first, second = bench.carrier.wanted
    assert first.spare is None
    assert second.spare is values
    values[:] = 7.0  # the next reply
    bench.vectors.close()
    assert torch.equal(bench.model.weight.detach().view(-1), torch.from_numpy(known[: 700 * 1000]))


def test_memory_of_a_reply_is_let_go_when_that_has_gone_up() -> None:
    lane = SlowLane()
    bench = Bench(on(lane))
    values = np.ones(bench.binding.layout.elements, np.float32)
    bench.vectors.anchor_at(values)
    assert (lane.up, lane.arrived_above) == (1, 0), "nobody waits for it"
    bench.vectors.anchor_at(values.copy())
    assert (lane.up, lane.arrived_above) == (2, 1)
    bench.push()
    assert lane.arrived_above == 2
    bench.vectors.merge(values, bench.up.part, moved=False)
    bench.vectors.close()
    assert lane.arrived_above == 3


def test_a_lane_that_cannot_reach_a_reply_gives_other_memory_for_the_next() -> None:
    class Picky(CpuLane):
        def reaches(self, vector: Any) -> bool:
            return bool(vector is mine)

        def host_vector(self, length: int) -> Any:
            return mine

    values = np.ones(700 * 1000 + 1000, np.float32)
    mine = np.zeros_like(values)
    bench = Bench(on(Picky(CPU)))
    bench.vectors.anchor_at(values)
    bench.push()
    bench.vectors.anchor_at(mine)
    bench.push()
    bench.vectors.close()
    assert [wanted.spare is mine for wanted in bench.carrier.wanted] == [True, True]
