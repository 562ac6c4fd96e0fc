"""Encoding and decoding: how near every codec comes to copying memory, and what it loses.

    encode           vector -> payload, block by block, as a worker does before it sends
    check + decode   payload -> vector, each block checked first, as a server does with what arrives

Bytes that must move, each once: the vector and the payload. Peer: `numpy.copyto` of two vectors of that size, read and
written. One thread each. `times as fast` compares bytes per second, so that a codec with small payloads is not made
to look fast by them.

The vector is ordinary noise, N(0, 1). `lost` is |x - decoded|^2 / |x|^2 of one block of it: of an update by itself,
before feedback brings it back, and before what starts from its last update has one. It is a matrix with rows of 1,000.
Checked after the last round: what was decoded lies within the codec's bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import harness
from benchmarks.harness import Benchmark, BenchmarkError, Case, Competitor
from common import codecs
from common.buffers import zeros
from common.chunks import Plan, plan
from common.codecs.base import BLOCK_ELEMENTS, F32, U8, Codec
from common.layout import Layout, Tensor

MB = 1_000_000
COPY = "numpy.copyto"
KEY = 0x5EED
COLUMNS = 1000

SizeMb = Annotated[int, typer.Option("--size-mb", min=1, help="Size of the vector, 10^6 bytes.")]
Names = Annotated[
    list[str] | None, typer.Option("--codec", help="Only this codec, with parameters if you like; repeat for more.")
]


def run(
    size_mb: SizeMb = 100,
    rounds: harness.Rounds = 9,
    names: Names = None,
    json_file: harness.JsonFile = None,
) -> None:
    """Measure, print, write."""
    elements = size_mb * MB // 4
    chosen = [codecs.load(name) for name in (names or codecs.names())]
    x, y = noise(elements), zeros(elements, np.float32)
    cases = [copying(x, y)]
    for codec in chosen:
        cases += coding(codec, x, y)
    results = harness.measure(cases, rounds)
    facts = [about(codec, x) for codec in chosen]
    Console().print(shown(facts))
    settings = {"threads": 1, "rounds": rounds, "elements": f"{elements:,}", "block": f"{BLOCK_ELEMENTS:,} elements"}
    harness.report(BENCHMARK.name, results, settings, json_file, more={"codecs": facts})


def noise(n: int) -> F32:
    """(n,) N(0, 1), drawn once for a few blocks, which then repeat."""
    x = zeros(n, np.float32)
    drawn = np.random.default_rng(0).standard_normal(min(n, 16 * BLOCK_ELEMENTS), dtype=np.float32)
    for first in range(0, n, drawn.size):
        x[first : first + drawn.size] = drawn[: n - first]
    return x


def matrix(elements: int, codec: Codec) -> Plan:
    """The plan of one matrix of so many elements."""
    return plan(Layout((Tensor("weight", (elements // COLUMNS, COLUMNS), "float32", "parameter"),)), codec.name)


def about(codec: Codec, x: F32) -> dict[str, Any]:
    """What it costs and loses on the first block."""
    block = matrix(x.size, codec).blocks[0]
    x = x[: block.last]
    data, y = np.zeros(block.codec.encoded_bytes(x.size), np.uint8), np.empty_like(x)
    block.codec.encode(x, data, KEY)
    block.codec.decode(data, y)
    lost = np.square(y.astype(np.float64) - x).sum() / np.square(x.astype(np.float64)).sum()
    return {"codec": codec.name, "bytes_per_element": data.size / x.size, "lost": float(lost)}


def shown(facts: Sequence[dict[str, Any]]) -> Table:
    """The facts for a terminal."""
    table = Table("codec", "bytes per element", "lost", box=None, header_style="bold")
    for row in facts:
        table.add_row(row["codec"], f"{row['bytes_per_element']:.4g}", f"{row['lost']:.2g}")
    return table


# Competitors


def copying(x: F32, y: F32) -> Case:
    """The memory itself."""

    @contextmanager
    def opened() -> Iterator[Competitor]:
        def copy() -> None:
            for first in range(0, x.size, BLOCK_ELEMENTS):
                np.copyto(y[first : first + BLOCK_ELEMENTS], x[first : first + BLOCK_ELEMENTS])

        yield Competitor(lambda: None, partial(clocked, copy), lambda: None, ())

    return Case(COPY, x.nbytes, 2 * x.nbytes, True, opened)


def coding(codec: Codec, x: F32, y: F32) -> list[Case]:
    """Both ways of one codec."""
    whole = matrix(x.size, codec)
    data = zeros(whole.bytes, np.uint8)
    moved = x.nbytes + whole.bytes
    ways = {"encode": partial(whole.encode, x, data, key=KEY), "check + decode": partial(opening, whole, data, y)}
    whole.encode(x, data, key=KEY)
    return [
        Case(f"{codec.name} {way}", x.nbytes, moved, False, partial(working, work, partial(check, whole, data, x)))
        for way, work in ways.items()
    ]


def opening(whole: Plan, data: U8, y: F32) -> None:
    """Chunk by chunk, as they arrive."""
    for chunk in whole.chunks:
        whole.open(chunk, data[chunk.offset : chunk.offset + chunk.size], y)


@contextmanager
def working(work: Callable[[], None], verify: Callable[[], None]) -> Iterator[Competitor]:
    """work: one round."""
    yield Competitor(work, partial(clocked, work), verify, ())


def check(whole: Plan, data: U8, x: F32) -> None:
    """Raise BenchmarkError unless all of the payload decodes to something within the bound."""
    y = np.empty(BLOCK_ELEMENTS, np.float32)
    for block in whole.blocks:
        part = x[block.first : block.last]
        whole.decode_block(block, data, y[: part.size])
        error = np.abs(y[: part.size].astype(np.float64) - part).astype(np.float32)
        if not (error <= block.codec.error_bound(part)).all():
            raise BenchmarkError(f"'{whole.codec}' decodes to something beyond its bound.")


def clocked(work: Callable[[], None]) -> float:
    """Seconds it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


BENCHMARK = Benchmark("codecs", "how fast does every codec encode, check and decode, against numpy.copyto?", run)
