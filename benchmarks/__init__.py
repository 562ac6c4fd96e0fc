"""One module per question; `python -m benchmarks NAME` answers it with a table, and with --json a file and a picture.

A module that does not start with an underscore offers one value, `BENCHMARK`; its file's name is its name.
"""

from __future__ import annotations

from benchmarks.harness import Benchmark
from common import discovery

HELPERS = ("harness", "players", "simulated")


def names() -> tuple[str, ...]:
    """Names of all benchmarks, sorted."""
    return discovery.names(__name__, helpers=HELPERS)


def load(name: str) -> Benchmark:
    """The benchmark of that name; raises ConfigError that names the nearest."""
    found: Benchmark = discovery.load(__name__, name, attribute="BENCHMARK", kind="benchmark", helpers=HELPERS)
    return found
