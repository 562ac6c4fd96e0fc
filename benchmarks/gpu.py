"""A model on a CUDA device: encoding there, the way to the host and back, and how long training waits for exchanges.

    device copy        y <- x on the device: what the others are compared with
    int8 encode        as the SDK encodes an update on the device
    gather, scatter    the model's tensors <-> one vector on the device
    down, up           that vector <-> host memory, as the SDK has bytes come and go: pinned, on a stream of its own
    pageable           the model's tensors -> a vector in host memory, as a model has it that lies on several devices
    SDK                training steps of a model as large as ResNet-50, with `session.step`, against a plain loop

GB/s counts what each reads and writes on the device. `stalled percent` is the share of the training time that
`session.step` waited for the server. Checked: what arrives is what was sent; the bytes of int8 are those of the host.

Needs a CUDA device, and says so where there is none. Left out: several workers on one device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn

from benchmarks import harness, players
from benchmarks.harness import Benchmark, BenchmarkError, Case, Competitor
from benchmarks.players import MB, Way
from common import chunks_on_device
from common.binding import Binding, layout_of
from common.buffers import zeros
from common.chunks import CHUNK_BYTES, plan
from common.layout import Layout
from common.layout import Tensor as Shape
from worker import Session
from worker.lanes import lane_of
from worker.on_device import PIECE_CHUNKS

COPY, PLAIN = "device copy", "plain loop"
CPU = torch.device("cpu")
TENSORS = 100
PIECE_BYTES = PIECE_CHUNKS * CHUNK_BYTES
LAYERS, WIDTH, BATCH = 25, 1000, 256
"""25 million parameters, as ResNet-50 has."""
EXCHANGES = ({"local_steps": 1, "overlap": True}, {"local_steps": 8, "overlap": True})

SizeMb = Annotated[int, typer.Option("--size-mb", min=1, help="Of what is copied and encoded, 10^6 bytes.")]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Training steps of a round.")]


def run(
    size_mb: SizeMb = 100, steps: Steps = 32, rounds: harness.Rounds = 9, json_file: harness.JsonFile = None
) -> None:
    """Measure, print, write."""
    if not torch.cuda.is_available():
        raise BenchmarkError("There is no CUDA device here, and this benchmark is about one.")
    found_ways = players.ways(print)
    measure(torch.device("cuda"), found_ways[0], size_mb, steps, (LAYERS, WIDTH, BATCH), rounds, json_file)


def measure(
    device: torch.device,
    way: Way,
    size_mb: int,
    steps: int,
    shape: tuple[int, int, int],
    rounds: int,
    json_file: Any = None,
) -> None:
    """All of it on that device. shape: (layers, width, batch) of the model that is trained."""
    elements = size_mb * MB // 4
    size = 4 * elements
    copies = harness.measure(
        [
            Case(COPY, size, 2 * size, True, partial(_copied, device, elements)),
            Case("int8 encode", size, size + size // 4, False, partial(_encoded, device, elements)),
            Case("gather", size, 2 * size, False, partial(_gathered, device, device, elements)),
            Case("scatter", size, 2 * size, False, partial(_scattered, device, elements)),
            Case("down", size, size, False, partial(_down, device, elements)),
            Case("up", size, size, False, partial(_up, device, elements)),
            Case("pageable", size, size, False, partial(_gathered, device, CPU, elements)),
        ],
        rounds,
    )
    stalls: dict[str, list[float]] = {}
    model_bytes = 4 * sum(p.numel() for p in _network(shape).parameters())
    cases = [Case(PLAIN, model_bytes, model_bytes, True, partial(_trained, device, shape, steps, None, None, []))]
    for settings in EXCHANGES:
        name = f"SDK, H = {settings['local_steps']}, overlap, {way.name}"
        stalls[name] = []
        opened = partial(_trained, device, shape, steps, way, settings, stalls[name])
        cases.append(Case(name, model_bytes, model_bytes, False, opened))
    trained = harness.measure(cases, rounds)
    rows = harness.rows(BENCHMARK.name, copies) + harness.rows(BENCHMARK.name, trained)
    for row in rows:
        if shares := stalls.get(row["case"]):
            row["also"] = {"stalled_percent": 100 * median(shares)}
    about = {"device": _name(device), "steps": steps, "rounds": rounds, "way": way.name}
    harness.report(BENCHMARK.name, [*copies, *trained], about, json_file, rows)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _settle(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(device: torch.device, work: Callable[[], None], verify: Callable[[], None]) -> Competitor:
    def one_round() -> float:
        _settle(device)
        started = time.perf_counter()
        work()
        _settle(device)
        return time.perf_counter() - started

    return Competitor(lambda: None, one_round, verify, ())


def _require(right: bool | Tensor | np.bool_, what: str) -> None:
    if not right:
        raise BenchmarkError(f"{what} is not what it should be.")


# Copies and encodings


def _values(device: torch.device, elements: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(elements, generator=generator, device=device)


@contextmanager
def _copied(device: torch.device, elements: int) -> Iterator[Competitor]:
    x = _values(device, elements)
    y = torch.zeros_like(x)
    yield _timed(device, lambda: void(y.copy_(x)), lambda: _require(torch.equal(x, y), "The copy"))


def void(result: object) -> None:
    """Nothing, of what only its doing was wanted."""


@contextmanager
def _encoded(device: torch.device, elements: int) -> Iterator[Competitor]:
    x = _values(device, elements)
    up = plan(Layout((Shape("x", (elements, 1), "float32", "parameter"),)), "int8")
    data = torch.zeros(up.bytes, dtype=torch.uint8, device=device)

    def verify() -> None:
        known = np.zeros(up.bytes, np.uint8)
        up.encode(x.cpu().numpy(), known)
        _require(np.array_equal(data.cpu().numpy(), known), "What was encoded")

    yield _timed(device, lambda: chunks_on_device.encode(up, x, data), verify)


def _model(device: torch.device, elements: int) -> Binding:
    """Bound tensors that hold `_values`."""
    model = nn.ParameterList([nn.Parameter(part) for part in _values(device, elements).tensor_split(TENSORS)])
    return Binding(model, layout_of(model))


@contextmanager
def _gathered(device: torch.device, target: torch.device, elements: int) -> Iterator[Competitor]:
    binding, flat = _model(device, elements), torch.zeros(elements, device=target)
    known = _values(device, elements).cpu()
    yield _timed(device, lambda: binding.gather(flat), lambda: _require(torch.equal(flat.cpu(), known), "The vector"))


@contextmanager
def _scattered(device: torch.device, elements: int) -> Iterator[Competitor]:
    binding, flat = _model(device, elements), _values(device, elements) + 1.0

    def verify() -> None:
        seen = torch.zeros_like(flat)
        binding.gather(seen)
        _require(torch.equal(seen, flat), "The model")

    yield _timed(device, lambda: binding.scatter(flat), verify)


@contextmanager
def _down(device: torch.device, elements: int) -> Iterator[Competitor]:
    """In pieces, each of which could be sent once it is there."""
    lane, x = lane_of(device), _values(device, elements).view(torch.uint8)
    landing = lane.landing(zeros(len(x), np.uint8))

    def work() -> None:
        with lane.aside():
            pieces = zip(landing.split(PIECE_BYTES), x.split(PIECE_BYTES), strict=True)
            arrivals = [lane.copy(there, here) for there, here in pieces]
        for arrival in arrivals:
            arrival.synchronize()

    yield _timed(device, work, lambda: _require(torch.equal(x.cpu(), landing), "What arrived"))


@contextmanager
def _up(device: torch.device, elements: int) -> Iterator[Competitor]:
    lane, x = lane_of(device), torch.zeros(elements, device=device)
    values = lane.host_vector(elements)
    values[:] = _values(CPU, elements).numpy()

    def work() -> None:
        with lane.aside():
            lane.copy(x, torch.from_numpy(values))
        lane.join()

    yield _timed(device, work, lambda: _require(np.array_equal(x.cpu().numpy(), values), "What arrived"))


# Training


def _network(shape: tuple[int, int, int]) -> nn.Sequential:
    layers, width, _ = shape
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)))


@contextmanager
def _trained(
    device: torch.device,
    shape: tuple[int, int, int],
    steps: int,
    way: Way | None,
    settings: dict[str, Any] | None,
    stalls: list[float],
) -> Iterator[Competitor]:
    torch.manual_seed(0)
    model = _network(shape).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x = torch.randn(shape[2], shape[1], device=device)

    def train(session: Session | None) -> None:
        started, waited = time.perf_counter(), session.exchanges.stalled_s if session else 0.0
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            if session is not None:
                session.step(loss, len(x))
        if session is not None:
            stalls.append((session.exchanges.stalled_s - waited) / (time.perf_counter() - started))

    if way is None:
        yield _timed(device, lambda: train(None), lambda: None)
        return
    pool_mib = max(players.pool_mib(sum(p.numel() for p in model.parameters()), 2), 64)
    with players.served(way, {**(settings or {}), "pool_mib": pool_mib}) as server:
        address = server.ready()
        with Session(address, model, optimizer, name="trainer", device=device) as session:

            def verify() -> None:
                _require(session.flush(), "The last push")
                center = session.global_model()
                pairs = zip(center.parameters(), model.parameters(), strict=True)
                _require(all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs), "The center")

            yield server.checked(_timed(device, lambda: train(session), verify))


BENCHMARK = Benchmark("gpu", "on a CUDA device: what do encoding, copies and exchanges cost a training?", run)
