"""`dynsgd`: asynchronous SGD with a rate that falls with staleness. After Jiang et al., SIGMOD 2017.

    c <- c + D / (lag + 1)

    c    center           D = x - anchor  the worker's update
    lag  changes of the center since the one the worker started from

The form that GEM was compared with (Hermans & Louppe, arXiv 1805.08469); the same division is in Zhang et al., arXiv
1511.05950. Takes any inner optimizer; has no settings. It is `downpour` with `lag_weight` "inverse": do not set both.

Laws: with lag 0 it is `downpour`, bit for bit; n workers that push in turn move the center by 1/n of their updates.
Left out: the multi-version schedule of the SIGMOD paper itself.
"""

from __future__ import annotations

from common.rules.base import Apply, Config, Effect, Facts, Reply, Rule, add_update


class Dynsgd(Config):
    """DynSGD has no settings of its own."""


def admit(config: Dynsgd, decisions: None, facts: Facts) -> tuple[None, list[Effect]]:
    """Apply every update as it comes, divided by its lag and one."""
    lag = facts.lag_versions
    return None, [
        Apply(1.0 / (lag + 1), f"divided by {lag + 1}: it is {lag} versions behind"),
        Reply(facts.worker, "after", "the center after this update"),
    ]


RULE = Rule(
    name="dynsgd",
    summary="asynchronous SGD that divides every update by its staleness and one",
    paper="Jiang et al., SIGMOD 2017, as in Hermans & Louppe, arXiv 1805.08469",
    Config=Dynsgd,
    admit=admit,
    apply=add_update,
)
