"""`adag`: accumulated gradient normalisation. Hermans, Spanakis & Möckel, arXiv 1710.02368.

    c <- c + D / H

    c  center           D = x - anchor  the progress of H local steps           H  optimizer steps in this update

The center moves by the mean local step of each update, so that many steps between pushes make no larger moves. H is
counted, not set: steps that a gradient scaler skipped are not in it, those trained while an exchange was in flight are.
Takes any inner optimizer; has no settings.

Laws: with H = 1 it is `downpour`, bit for bit; the move is no longer than the longest local step.
Left out: the name's other meaning, a norm of the update set against its staleness (an experiment of the same authors).
"""

from __future__ import annotations

from common.rules.base import Apply, Config, Effect, Facts, Reply, Rule, add_update


class Adag(Config):
    """Accumulated gradient normalisation has no settings of its own."""


def admit(config: Adag, decisions: None, facts: Facts) -> tuple[None, list[Effect]]:
    """Apply every update as it comes, divided by the steps in it."""
    steps = max(facts.steps, 1)
    return None, [
        Apply(1.0 / steps, f"divided by its {steps} local steps"),
        Reply(facts.worker, "after", "the center after this update"),
    ]


RULE = Rule(
    name="adag",
    summary="asynchronous SGD that divides every update by its number of local steps",
    paper="Hermans, Spanakis & Möckel, arXiv 1710.02368",
    Config=Adag,
    admit=admit,
    apply=add_update,
)
