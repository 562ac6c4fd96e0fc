"""`downpour`: plain asynchronous SGD. Dean et al., Large Scale Distributed Deep Networks, NeurIPS 2012.

    c <- c + D          D = x - anchor, the progress of H local steps

    c  center           D  the worker's update           H  local steps between pushes

The baseline of all others; takes any inner optimizer. Left out: the paper's Adagrad on the server (updates here are
parameter deltas, not gradients) and its separate push and fetch periods (an exchange is always both).
"""

from __future__ import annotations

from common.rules.base import Config, Rule, add_update


class Downpour(Config):
    """DOWNPOUR has no settings of its own."""


RULE = Rule(
    name="downpour",
    summary="plain asynchronous SGD: the center adds every update as it comes",
    paper="Dean et al., NeurIPS 2012",
    Config=Downpour,
    apply=add_update,
)
