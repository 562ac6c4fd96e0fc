"""One exchange: push an update, apply it, pull the center. Paramserver and its peers, in turn.

    flat update ready -> encode -> push -> apply (downpour: c <- c + D) -> pull -> decode -> flat center held

What each round costs a user: encoding and decoding count, the training step does not. Update and reply are in the same
codec. D is 1 everywhere, so that after k exchanges the center is start + k; each reply is checked at both ends, the
last one whole. A round of a small model is several exchanges, and its time the mean of them.

Peers: `torch.distributed.rpc`: a process that holds the center, and `rpc_sync` of a function that adds in place and
returns it (TensorPipe with its own choice of transport). `gloo`: send and recv of the same bytes, nothing applied. `Ray
actor`, where it is installed: an actor that adds and returns the center, another that asks it to. `copyto`: the memory
itself, four passes (into the transport and out of it, both ways). Each peer has its defaults, and float32.

Where memory does not hold all cases of a size at once, each of ours is measured with the peers that fit beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from torch import distributed
from torch.distributed import rpc

from benchmarks import harness, players
from benchmarks.harness import Benchmark, BenchmarkError, Case, Competitor, Link, Result, Row, child, competitor
from benchmarks.players import MB, RAY, RPC, START, STEP, TOLERANCE, Client, Way, check, check_ends

GLOO, COPY = "gloo send+recv", "4 x numpy.copyto"
CODECS = ("fp32", "bf16", "int8")
NEEDS = {"ours": 8, COPY: 2, GLOO: 4, RPC: 7, RAY: 8}
"""Copies of the model in memory, about."""
ROOM = 0.7
"""Of the free memory."""
ROUND_BYTES, TIMES_LIMIT = 40 * MB, 20
"""So much is pushed in a round, by so many exchanges at most."""

Sizes = Annotated[list[int], typer.Option("--sizes", min=1, help="Sizes of the model, 10^6 bytes; repeat for more.")]
Codecs = Annotated[list[str], typer.Option("--codecs", help="Of update and reply; repeat for more.")]
Only = Annotated[list[str] | None, typer.Option("--only", help="Only cases with this in their name; repeat for more.")]


def run(
    sizes: Sizes = [100],  # noqa: B006 (typer's way to say it)
    codecs: Codecs = list(CODECS),  # noqa: B006
    rounds: harness.Rounds = 9,
    only: Only = None,
    json_file: harness.JsonFile = None,
) -> None:
    """Measure, print, write."""
    console = Console()

    def say(sentence: str) -> None:
        console.print(sentence, style="dim", highlight=False)

    ways = players.ways(say)
    if not players.has_ray():
        say("Ray is left out: it is not installed.")
    results: list[Result] = []
    found: list[Row] = []
    for size_mb in sizes:
        chosen = [case for case in cases(size_mb, ways, codecs) if not only or any(part in case.name for part in only)]
        together = harness.groups(chosen, int(ROOM * harness.free_bytes()))
        measured = {case.name for group in together for case in group}
        for case in chosen:
            if case.name not in measured:
                say(f"{case.name} of {size_mb} MB is left out: it wants {case.needs_bytes / 1e9:.0f} GB.")
        for group in together:
            done = harness.measure(group, rounds)
            rows = harness.rows(BENCHMARK.name, done)
            known = {(row["case"], row["size_bytes"]) for row in found}
            new = [(row["case"], row["size_bytes"]) not in known for row in rows]
            found += [row for row, is_new in zip(rows, new, strict=True) if is_new]
            results += [result for result, is_new in zip(done, new, strict=True) if is_new]
    if not results:
        raise BenchmarkError(f"No case has {only} in its name.")
    settings = {"rule": players.RULE, "rounds": rounds, "sizes_mb": sizes, "codecs": ", ".join(codecs)}
    harness.report(BENCHMARK.name, results, settings, json_file, found)


def cases(size_mb: int, ways: Sequence[Way], codecs: Sequence[str]) -> list[Case]:
    """Every way to exchange a model of that size."""
    elements = size_mb * MB // 4
    times = times_of(size_mb)
    found = [ours(way, codec, elements, times) for codec in codecs for way in ways]
    found += [
        _case(COPY, elements, True, partial(_alone, COPY, _copy, elements, times)),
        _case(GLOO, elements, True, partial(_pair, GLOO, _gloo_server, _gloo_client, elements, times)),
        _case(RPC, elements, True, partial(_pair, RPC, players.rpc_serve, _rpc_client, elements, times)),
    ]
    if players.has_ray():
        found.append(_case(RAY, elements, True, partial(_alone, RAY, _ray, elements, times)))
    return found


def times_of(size_mb: int) -> int:
    """Exchanges in a round of that size."""
    return min(max(ROUND_BYTES // (size_mb * MB), 1), TIMES_LIMIT)


def ours(way: Way, codec: str, elements: int, times: int) -> Case:
    """One worker of a server of ours."""
    name = f"paramserver {way.name} {codec}"
    return _case(name, elements, False, partial(_paramserver, way, codec, elements, times))


def _case(name: str, elements: int, peer: bool, opened: Callable[[], Iterator[Competitor]]) -> Case:
    size = 4 * elements
    return Case(name, size, 2 * size, peer, contextmanager(opened), NEEDS[name if peer else "ours"] * size)


# paramserver


def _paramserver(way: Way, codec: str, elements: int, times: int) -> Iterator[Competitor]:
    pool_mib = max(players.pool_mib(elements, 1, codec, codec), 64)
    settings = {"codec": codec, "reply_codec": codec, "pool_mib": pool_mib}
    with (
        players.served(way, settings) as server,
        child(f"paramserver {way.name} worker", _work, way, codec, elements, times) as worker,
    ):
        yield server.checked(competitor(worker, server.process, first=lambda: worker.tell(server.ready())))


def _work(link: Link, way: Way, codec: str, elements: int, times: int) -> None:
    address = next(link.requests(), None)
    if address is None:  # the benchmark is gone before it began
        return
    client = Client(address, way, players.payload(elements, codec))
    tolerance = TOLERANCE[codec]
    harness.answer_rounds(
        link,
        client.exchange,
        lambda k: check_ends(client.reply, START + STEP * k, tolerance),
        lambda k: check(client.reply, START + STEP * k, tolerance),
        times,
    )
    client.close()


# Peers


Target = Callable[[Link, str, int], None]
"""target(link, where to meet, elements)"""


def _pair(
    name: str, server: Target, client: Callable[[Link, str, int, int], None], elements: int, times: int
) -> Iterator[Competitor]:
    with (
        players.meeting() as meeting,
        child(f"{name} server", server, meeting, elements) as serving,
        child(f"{name} client", client, meeting, elements, times) as asking,
    ):
        yield competitor(asking, serving)


def _alone(name: str, target: Callable[[Link, int, int], None], elements: int, times: int) -> Iterator[Competitor]:
    with child(name, target, elements, times) as process:
        yield competitor(process)


def _rpc_client(link: Link, meeting: str, elements: int, times: int) -> None:
    players.rpc_join("client", 1, 2, meeting)
    delta, reply = torch.full((elements,), STEP), torch.zeros(elements)

    def exchange() -> None:
        nonlocal reply
        reply = rpc.rpc_sync("server", players.push, args=(delta,))

    harness.answer_rounds(
        link,
        exchange,
        lambda k: check_ends(reply.numpy(), START + STEP * k),
        lambda k: check(reply.numpy(), START + STEP * k),
        times,
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


def _gloo_client(link: Link, meeting: str, elements: int, times: int) -> None:
    _join_gloo(1, meeting)
    delta, reply = torch.full((elements,), STEP), torch.zeros(elements)

    def exchange() -> None:
        distributed.send(delta, dst=0)
        distributed.recv(reply, src=0)

    def check_round(k: int) -> None:
        check_ends(reply.numpy(), STEP)
        reply[0] = reply[-1] = float("nan")  # every round brings the same values: do not take an old one for new

    harness.answer_rounds(link, exchange, check_round, lambda k: check(reply.numpy()[1:-1], STEP), times)
    os._exit(0)


def _ray(link: Link, elements: int, times: int) -> None:
    crowd = players.RayCrowd(elements, 1)
    try:
        link.answer("ready")
        done = 0
        for request in link.requests():
            if request == "verify":
                crowd.verify(START + STEP * (done + 1))
                link.answer("right")
            else:
                [taken] = crowd.exchanges(times)
                done += len(taken)
                link.answer(sum(taken) / len(taken))
    finally:
        crowd.close()


def _copy(link: Link, elements: int, times: int) -> None:
    here, there = np.full(elements, STEP, np.float32), np.zeros(elements, np.float32)

    def exchange() -> None:
        for source, target in ((here, there), (there, here)) * 2:
            np.copyto(target, source)

    harness.answer_rounds(link, exchange, lambda k: check_ends(there, STEP), lambda k: check(there, STEP), times)


BENCHMARK = Benchmark("roundtrip", "push + apply + pull of one model, against torch.distributed.rpc, gloo and Ray", run)
