"""`downpour`: plain asynchronous SGD. Dean et al., Large Scale Distributed Deep Networks, NeurIPS 2012.

    c <- c + D          D = x - anchor, the progress of H local steps

    c  center           D  the worker's update           H  local steps between pushes

The baseline of all others; takes any inner optimizer. Left out: the paper's Adagrad on the server (updates here are
parameter deltas, not gradients) and its separate push and fetch periods (an exchange is always both).
"""

from __future__ import annotations

from typing import Any

from common.rules.base import Arrays, Config, Floats, Rule, kernel


class Downpour(Config):
    """DOWNPOUR has no settings of its own."""


@kernel
def _add(c: Any, d: Any, weight: Any) -> None:
    for i in range(c.size):
        c[i] += weight * d[i]


def apply(
    config: Config,
    c: Floats,
    state: Arrays,
    session: Arrays,
    d: Floats,
    weight: float,
    args: tuple[float, ...],
    stats: Floats,
) -> None:
    """c <- c + weight D."""
    _add(c, d, c.dtype.type(weight))


RULE = Rule(
    name="downpour",
    summary="plain asynchronous SGD: the center adds every update as it comes",
    paper="Dean et al., NeurIPS 2012",
    Config=Downpour,
    apply=apply,
)
