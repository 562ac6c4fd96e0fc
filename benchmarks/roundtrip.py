"""One exchange: push an update, apply it, pull the center. Paramserver and its peers, in turn.

    flat update ready -> encode -> push -> apply (downpour: c <- c + D) -> pull -> decode -> flat center held

What each round costs a user: encoding and decoding count, the training step does not. D is 1 everywhere, so that after
k rounds the center is exactly its start + k; each reply is checked at both ends, the last one whole.

Peers: `torch.distributed.rpc`: a process that holds the center, and `rpc_sync` of a function that adds in place and
returns it (TensorPipe with its own choice of transport). `gloo`: send and recv of the same bytes, nothing applied.
`copyto`: the memory itself, four passes (into the transport and out of it, both ways). Each peer has its defaults.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import distributed
from torch.distributed import rpc

from benchmarks import harness
from benchmarks.harness import Benchmark, BenchmarkError, Case, Competitor, Link, child, competitor
from common import LIBRARY
from common.buffers import zeros
from common.codecs.base import F32
from common.config import ServerSettings
from common.layout import Layout, Tensor
from common.messages import Optimizer, Scalars
from paramserver.daemon import Daemon
from worker.core import (
    LOSSLESS,
    Failed,
    Fetched,
    InitialWeights,
    Leave,
    NeedWeights,
    Settled,
    WorkerCore,
)
from worker.driver import SWITCH_INTERVAL_S, Driver

MB = 1_000_000
START, STEP = 0.5, 1.0
"""Value of the center before the first round, and what each round adds: sums that float32 holds exactly."""
RULE, CODEC = "downpour", "fp32"
TRANSPORTS = ("tcp", "ipc")
PEER_ENVIRONMENT = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
"""Without it, each end of a connection reports the end of the other."""
if sys.platform == "linux":  # or they look for a network interface by the host's name, which may not resolve
    PEER_ENVIRONMENT |= {"GLOO_SOCKET_IFNAME": "lo", "TP_SOCKET_IFNAME": "lo"}
RPC, GLOO, COPY = "torch.distributed.rpc", "gloo send+recv", "4 x numpy.copyto"

SizeMb = Annotated[int, typer.Option("--size-mb", min=1, help="Size of the model, 10^6 bytes.")]
Only = Annotated[list[str] | None, typer.Option("--only", help="Only cases with this in their name; repeat for more.")]


def run(
    size_mb: SizeMb = 100, rounds: harness.Rounds = 9, only: Only = None, json_file: harness.JsonFile = None
) -> None:
    """Measure, print, write."""
    chosen = [case for case in cases(size_mb) if not only or any(part in case.name for part in only)]
    if not chosen:
        raise BenchmarkError(f"No case has {only} in its name.")
    settings = {"rule": RULE, "rounds": rounds, "parameters": f"{size_mb * MB // 4:,}"}
    harness.report(BENCHMARK.name, harness.measure(chosen, rounds), settings, json_file)


def cases(size_mb: int) -> list[Case]:
    """Every way to exchange a model of that size."""
    size_bytes = size_mb * MB
    elements = size_bytes // 4
    both_ways = 2 * size_bytes
    ours = [
        Case(
            f"paramserver {transport} {CODEC}", size_bytes, both_ways, False, partial(_paramserver, transport, elements)
        )
        for transport in TRANSPORTS
    ]
    peers = [
        Case(RPC, size_bytes, both_ways, True, partial(_pair, RPC, _rpc_server, _rpc_client, elements)),
        Case(GLOO, size_bytes, both_ways, True, partial(_pair, GLOO, _gloo_server, _gloo_client, elements)),
        Case(COPY, size_bytes, both_ways, True, partial(_alone, COPY, _copy, elements)),
    ]
    return ours + peers


# paramserver


@contextmanager
def _paramserver(transport: str, elements: int) -> Iterator[Competitor]:
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        bind = f"ipc://{folder}/server" if transport == "ipc" else "tcp://127.0.0.1:*"
        name = f"paramserver {transport}"
        with child(f"{name} server", _serve, bind) as server, child(f"{name} worker", _work, elements) as worker:
            yield competitor(worker, server, first=lambda: worker.tell(server.hear(harness.START_LIMIT_S)))


def _serve(link: Link, bind: str) -> None:
    def announce(level: str, sentence: str) -> None:
        if level != "info":
            print(f"server: {sentence}", file=sys.stderr)

    link.serve()
    settings = ServerSettings(bind=(bind,), rule=RULE, codec=CODEC, reply_codec=CODEC, drain_s=1.0)
    Daemon(settings, announce, link.answer).run()


def _work(link: Link, elements: int) -> None:
    address = next(link.requests(), None)
    if address is None:  # the benchmark is gone before it began
        return
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    layout = Layout((Tensor("weight", (1, elements), "float32", "parameter"),))
    core = WorkerCore(
        name="benchmark",
        instance=secrets.token_hex(8),
        library=LIBRARY,
        layout=layout,
        optimizer=Optimizer("SGD", 0.1, 0.0, 1, False, 0.0),
    )
    up, exact = core.plan(CODEC), core.plan(LOSSLESS)
    reply, weights, update = zeros(elements, np.float32), zeros(exact.bytes, np.uint8), zeros(up.bytes, np.uint8)
    delta = up.in_place(update)
    assert delta is not None, CODEC
    reply.fill(START)
    exact.encode(reply, weights)
    delta.fill(STEP)
    driver = Driver(core, address)
    while not isinstance(first := _await(driver, NeedWeights, Fetched), Fetched):
        driver.post(InitialWeights(weights))
    base = first.base
    scalars = Scalars(loss=1.0, samples=1, steps=1, lr=0.1)

    def exchange() -> None:
        nonlocal base, reply
        driver.push(delta, up, update, scalars, base, reply)
        settled = _await(driver, Settled)
        if settled.values is None:
            raise BenchmarkError(f"The push was {settled.outcome} ({settled.code}): {settled.sentence}")
        reply, base = settled.values, settled.base

    harness.answer_rounds(link, exchange, lambda k: _check_ends(reply, START + k), lambda k: _check(reply, START + k))
    driver.post(Leave("the benchmark is over"))
    driver.close(harness.END_LIMIT_S)


def _await(driver: Driver, *kinds: type[Any]) -> Any:
    """The next news of these kinds; raises where the server says no, or nothing for too long."""
    deadline = time.monotonic() + harness.ROUND_LIMIT_S
    while (left := deadline - time.monotonic()) > 0:
        news = driver.news(left)
        if isinstance(news, kinds):
            return news
        if isinstance(news, Failed):
            raise news.error
    names = " or ".join(kind.__name__ for kind in kinds)
    raise BenchmarkError(f"No {names} came within {harness.ROUND_LIMIT_S:g} s.")


# Peers


Target = Callable[[Link, str, int], None]
"""target(link, where to meet, elements)"""


@contextmanager
def _pair(name: str, server: Target, client: Target, elements: int) -> Iterator[Competitor]:
    """Two processes that meet at a file, so that no port has to be found."""
    for variable, value in PEER_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)  # read as the children import torch
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        with (
            child(f"{name} server", server, meeting, elements) as serving,
            child(f"{name} client", client, meeting, elements) as asking,
        ):
            yield competitor(asking, serving)


@contextmanager
def _alone(name: str, target: Callable[[Link, int], None], elements: int) -> Iterator[Competitor]:
    with child(name, target, elements) as process:
        yield competitor(process)


_center = torch.zeros(0)
"""The center of the process that serves torch.distributed.rpc."""


def _push(delta: torch.Tensor) -> torch.Tensor:
    """Runs in the server: c <- c + D. delta and result: (elements,) float32."""
    return _center.add_(delta)


def _join_rpc(name: str, rank: int, meeting: str) -> None:
    options = rpc.TensorPipeRpcBackendOptions(init_method=meeting, rpc_timeout=harness.ROUND_LIMIT_S)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using a Backend")  # torch's own call of torch
        rpc.init_rpc(name, rank=rank, world_size=2, rpc_backend_options=options)


def _rpc_server(link: Link, meeting: str, elements: int) -> None:
    global _center
    link.serve()
    _center = torch.full((elements,), START)
    _join_rpc("server", 0, meeting)
    while True:
        time.sleep(harness.ROUND_LIMIT_S)


def _rpc_client(link: Link, meeting: str, elements: int) -> None:
    _join_rpc("client", 1, meeting)
    delta, reply = torch.full((elements,), STEP), torch.zeros(elements)

    def exchange() -> None:
        nonlocal reply
        reply = rpc.rpc_sync("server", _push, args=(delta,))

    harness.answer_rounds(
        link, exchange, lambda k: _check_ends(reply.numpy(), START + k), lambda k: _check(reply.numpy(), START + k)
    )
    os._exit(0)  # the server is told by the benchmark; a shutdown in step with it could only wait


def _join_gloo(rank: int, meeting: str) -> None:
    limit = timedelta(seconds=harness.START_LIMIT_S)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)


def _gloo_server(link: Link, meeting: str, elements: int) -> None:
    """Sends back what it receives."""
    link.serve()
    _join_gloo(0, meeting)
    buffer = torch.zeros(elements)
    while True:
        distributed.recv(buffer, src=1)
        distributed.send(buffer, dst=1)


def _gloo_client(link: Link, meeting: str, elements: int) -> None:
    _join_gloo(1, meeting)
    delta, reply = torch.full((elements,), STEP), torch.zeros(elements)

    def exchange() -> None:
        distributed.send(delta, dst=0)
        distributed.recv(reply, src=0)

    def check(k: int) -> None:
        _check_ends(reply.numpy(), STEP)
        reply[0] = reply[-1] = float("nan")  # every round brings the same values: do not take an old one for new

    def verify(k: int) -> None:
        _check(reply.numpy()[1:-1], STEP)

    harness.answer_rounds(link, exchange, check, verify)
    os._exit(0)


def _copy(link: Link, elements: int) -> None:
    here, there = np.full(elements, STEP, np.float32), np.zeros(elements, np.float32)

    def exchange() -> None:
        for source, target in ((here, there), (there, here)) * 2:
            np.copyto(target, source)

    harness.answer_rounds(link, exchange, lambda k: _check_ends(there, STEP), lambda k: _check(there, STEP))


# Checking


def _check_ends(vector: F32, expected: float) -> None:
    if not vector[0] == vector[-1] == np.float32(expected):
        raise BenchmarkError(f"The reply holds {vector[0]} and {vector[-1]} at its ends, {expected} expected.")


def _check(vector: F32, expected: float) -> None:
    wrong = int(np.count_nonzero(vector != np.float32(expected)))
    if wrong:
        raise BenchmarkError(f"{wrong:,} of {vector.size:,} values are not {expected}.")


BENCHMARK = Benchmark("roundtrip", "push + apply + pull of one model, against torch.distributed.rpc and gloo", run)
