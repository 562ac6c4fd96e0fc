"""What is going on, as plain values: who is here, versions, lag, rates, and what is waited for."""

from __future__ import annotations

import json
import math
from collections import deque
from typing import TYPE_CHECKING, Any

from paramserver import diversity, memory

if TYPE_CHECKING:
    from paramserver.core import ServerCore
    from paramserver.session import Session
    from paramserver.shard import Shard

WINDOW_S = 10.0
"""Rates are taken over this long."""
LIMIT_BYTES = 1 << 20
"""An answer fits one payload; with very many workers the quietest are left out."""


class Throughput:
    """Samples and updates of the last seconds; bounded."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=100_000)
        self._reported: deque[tuple[float, int]] = deque(maxlen=100_000)

    def add(self, now: float, samples: int) -> None:
        """One update of so many samples was applied."""
        self._seen.append((now, samples))

    def add_samples(self, now: float, samples: int) -> None:
        """So many samples were reported, without an update."""
        self._reported.append((now, samples))

    def rates(self, now: float) -> tuple[float, float]:
        """(updates, samples) per second."""
        for events in (self._seen, self._reported):
            while events and now - events[0][0] > WINDOW_S:
                events.popleft()
        both = [*self._seen, *self._reported]
        if not both:
            return 0.0, 0.0
        span = max(now - min(at for at, _ in both), 0.1)
        return len(self._seen) / span, sum(samples for _, samples in both) / span


def describe(core: ServerCore, now: float) -> dict[str, Any]:
    """The whole state as plain values (finite numbers, strings, lists), ready for JSON."""
    updates_per_s, samples_per_s = core.rates.rates(now)
    shard = core.shard
    slots = core.state.model.slots if core.state.model else None
    known = sorted(core.sessions.values(), key=lambda session: (not session.live, session.worker))
    return {
        "rule": core.settings.rule,
        "rule_settings": dict(core.settings.rule_settings),
        "codec": core.settings.codec,
        "replies": core.settings.replies,
        "reply_codec": core.settings.reply_codec,
        "local_steps": core.settings.local_steps,
        "local_steps_by": core.settings.local_steps_by,
        "overlap": core.settings.overlap,
        "epoch": core.version.epoch,
        "version": core.version.version,
        "durable": str(core.state.durable),
        "parameters": shard.layout.parameters if shard else 0,
        "phase": _phase(core),
        "waiting_for": _waiting_for(core, now),
        "updates": core.state.budget.updates,
        "samples": core.state.budget.samples,
        "elapsed_s": round(core.state.budget.elapsed_s(now), 3),
        "budget_used": round(core.state.budget.share(now), 4),
        "updates_per_s": round(updates_per_s, 2),
        "samples_per_s": round(samples_per_s, 1),
        "diversity": diversity.describe(core.state.diversity, core.state.loads, core.settings.diversity_delta),
        "finished": core.state.finished,
        "workers": [_worker(session, now) for session in known if session.role == "worker"],
        "observers": sum(session.live and session.role == "observer" for session in known),
        "refusals": dict(core.out.refusals),
        "drained_messages": core.drained + core.uplink.drained,
        "memory_bytes": _memory_bytes(core, shard) if shard else 0,
        "slots": {"limit": slots.limit, "taken": slots.taken} if slots else {"limit": 0, "taken": 0},
    }


def _memory_bytes(core: ServerCore, shard: Shard) -> int:
    """What the server needs as things are now: the stated sum."""
    return memory.plan(core.settings, shard.layout).total(len(core.members), core.state.sharing)


def encode(values: dict[str, Any]) -> bytes:
    """As JSON within one payload."""
    data = json.dumps(values, allow_nan=False).encode()
    while len(data) > LIMIT_BYTES and (values["workers"] or values["waiting_for"]):
        for rows in ("workers", "waiting_for"):
            values[rows] = values[rows][: len(values[rows]) // 2]
        data = json.dumps(values, allow_nan=False).encode()
    return data


def _phase(core: ServerCore) -> str:
    if core.state.diverged:
        return "diverged"
    if core.state.stopping:
        return "stopping"
    if core.state.finished:
        return "finished"
    if not core.state.initialised:
        return "waiting for initial weights" if core.shard else "waiting for the first worker"
    return "training" if core.members else "waiting for workers"


def _waiting_for(core: ServerCore, now: float) -> list[str]:
    """One sentence for each thing that is waited for."""
    sentences = []
    initialiser = core.initial.asked
    if initialiser is not None:
        sentences.append(f"{initialiser.worker} to send the initial weights")
    if waited_for := core.state.waited_for:
        held = sum(session.decision.outcome == "held" for session in core.members)
        by = f", by {held} that are held" if held else ""
        sentences += [
            f"{worker} to {'train or upload' if core.state.rule.schedules else 'push'}{by}" for worker in waited_for
        ]
    for session in core.members:
        transfer = session.transfer
        if transfer is not None and transfer.slot is None and transfer.begin.kind == "push":
            sentences.append(f"a free slot for {session.worker}, since {now - transfer.since:.1f} s")
        elif now - session.last_seen > core.settings.lease_s / 3:
            left = session.lease_end - now
            sentences.append(f"a sign of {session.worker}, silent; given up in {max(left, 0.0):.0f} s")
    return sentences


def _worker(session: Session, now: float) -> dict[str, Any]:
    counters = session.counters
    return {
        "name": session.worker,
        "state": session.state,
        "updates": counters.updates,
        "rejected": counters.rejected,
        "steps": counters.steps,
        "samples": counters.samples,
        "loss": round(counters.loss, 6) if math.isfinite(counters.loss) else None,
        "lag": counters.lag_versions,
        "bytes_up": counters.bytes_up,
        "bytes_down": counters.bytes_down,
        "shares_memory": session.memory is not None,
        "last_seen_s": round(now - session.last_seen, 2),
        "last_progress_s": round(now - session.last_progress, 2),
        "joined_s": round(now - session.joined, 2),
    }
