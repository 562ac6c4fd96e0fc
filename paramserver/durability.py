"""What survives the process: when a checkpoint is due, what is in it, and how a server goes on from one. Pure.

Laws
* A checkpoint is one version: center, rule state, sessions and their last decided numbers, copied by one job in the
  order of work into a shadow that nothing else touches until it is written.
* `durable` moves only when the shell says that everything is on disk.
* The initial weights are saved at once. After that writing takes at most a twentieth of the time, and a failure costs
  nothing but the attempt.
* A center that is not finite is never saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace
from typing import Any

import numpy as np

from common import LIBRARY
from common.codecs.base import F32
from common.errors import ConfigError, StateError
from common.layout import Layout
from common.messages import NOWHERE, Version
from common.values import dataclass
from paramserver.diversity import Averages
from paramserver.order import Job, WorkOrder
from paramserver.session import Session
from paramserver.shard import Work
from paramserver.state import CONNECTION_BITS, Outbox, ServerState

SAVE_SHARE = 0.05
"""Writing checkpoints may take at most this share of the time."""


@dataclass(frozen=True, slots=True)
class Saved:
    """Event: everything up to `version` is durable."""

    version: Version
    seconds: float


@dataclass(frozen=True, slots=True)
class SaveFailed:
    """Event: nothing was saved; the previous checkpoint is as it was."""

    sentence: str


@dataclass(frozen=True, slots=True)
class Save:
    """Action: write `arrays` and `record` as one checkpoint. The arrays do not change until Saved or SaveFailed."""

    version: Version
    arrays: dict[str, F32] = field(repr=False)
    record: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a checkpoint held: arrays by name, and the record beside them."""

    arrays: dict[str, F32] = field(repr=False)
    record: dict[str, Any] = field(repr=False)


class Durability:
    """Checkpoints of one server; does nothing where it has no directory."""

    def __init__(self, state: ServerState, out: Outbox, order: WorkOrder) -> None:
        self._state = state
        self._out = out
        self._order = order
        self._due: float | None = None
        self._failures = 0
        self._shadow: dict[str, F32] = {}
        self.saving = False
        """From the moment a checkpoint is due until it is written or has failed."""

    @property
    def deadline(self) -> float | None:
        """When the next checkpoint is due."""
        return None if self.saving or not self.needed else self._due

    @property
    def needed(self) -> bool:
        """Whether there is anything that is not durable."""
        state = self._state
        return bool(
            state.settings.directory and state.initialised and not state.diverged and state.durable < state.version
        )

    def tick(self) -> None:
        """Save, if it is due."""
        if not self.needed or self.saving:
            return
        if self._due is None:  # without the initial weights on disk, a crash would leave a server that knows nothing
            wait_s = 0.0 if self._state.durable == NOWHERE else self._state.settings.checkpoint_interval_s
            self._due = self._state.now + wait_s
        if self._state.now >= self._due:
            self.save()

    def soon(self) -> None:
        """Let the next checkpoint be due now."""
        self._due = self._state.now

    def save(self) -> None:
        """Copy everything into the shadow, and have it written."""
        self.saving = True
        sources: dict[str, F32] = {}

        def start() -> Work | None:
            if self._state.diverged:  # since this was put into the order of work
                self.saving = False
                return None
            sources.update(self._arrays())
            kept = {name: a for name, a in self._shadow.items() if name in sources and a.shape == sources[name].shape}
            # pages of a fresh one come as the copy fills it, on the kernels' threads
            self._shadow = {
                name: kept[name] if name in kept else np.empty(source.shape, np.float32)
                for name, source in sources.items()
            }
            shard = self._state.hosted.shard
            return shard.copy_work(list(sources.values()), [self._shadow[name] for name in sources])

        self._order.add(Job("checkpoint", start, self._copied))

    def saved(self, version: Version, seconds: float) -> None:
        """The shell has written a checkpoint."""
        self.saving = False
        self._failures = 0
        self._state.unsaved_since = None
        self._state.durable = version
        rest_s = max(self._state.settings.checkpoint_interval_s, seconds / SAVE_SHARE - seconds)
        self._due = self._state.now + rest_s
        self._out.record("checkpoint", version=version.version, seconds=seconds)

    def failed(self, sentence: str) -> None:
        """The shell could not write it."""
        state = self._state
        self.saving = False
        self._failures += 1
        state.unsaved_since = state.now if state.unsaved_since is None else state.unsaved_since
        self._due = state.now + state.settings.checkpoint_interval_s
        self._out.say("error", f"Checkpoint failed: {sentence} Training goes on; the previous one is as it was.")
        self._out.record("checkpoint_failed", sentence=sentence)

    @property
    def gave_up(self) -> bool:
        """Whether the last attempt failed."""
        return self._failures > 0

    def _copied(self, results: Sequence[bool]) -> None:
        arrays = {name: array.reshape(-1) for name, array in self._shadow.items()}
        for session in self._state.members:
            if session.buffers is not None:
                arrays[f"buffers.{session.token}"] = session.buffers.copy()
        self._out.add(Save(self._state.version, arrays, self._record()))

    def _arrays(self) -> dict[str, F32]:
        """Every array of the state that is as long as the model, by its name in a checkpoint."""
        shard = self._state.hosted.shard
        arrays: dict[str, F32] = {"center": shard.center}
        arrays |= {f"state.{name}": array for name, array in shard.state._asdict().items()}
        for session in self._state.members:
            if session.arrays is not None and session.anchored:
                arrays |= {f"session.{session.token}.{name}": a for name, a in session.arrays._asdict().items()}
        return arrays

    def _record(self) -> dict[str, Any]:
        """The part of the state that is no array, as plain values; `restore` is the inverse."""
        state, shard = self._state, self._state.hosted.shard
        return {
            "library": LIBRARY,
            "version": list(shard.version),
            "layout": shard.layout.describe().decode(),
            "rule": state.settings.rule,
            "rule_settings": dict(state.settings.rule_settings),
            "decisions": shard.decisions,
            "settings": state.settings.model_dump(mode="json"),
            "updates": state.budget.updates,
            "samples": state.budget.samples,
            "elapsed_s": state.budget.elapsed_s(state.now),
            "diversity": state.diversity.remember(),
            "sessions": [session.remember() for session in state.sessions.values() if session.role == "worker"],
        }


def restore(state: ServerState, recovered: Recovered) -> None:
    """Fill a state whose model is made (`rule` and `layout` of the checkpoint) with what a checkpoint held."""
    record, arrays, shard = recovered.record, recovered.arrays, state.hosted.shard
    shard.center[:] = arrays["center"]
    for name, array in shard.state._asdict().items():
        array[...] = arrays[f"state.{name}"].reshape(array.shape)
    shard.decisions = record["decisions"]
    state.recovered = state.durable = Version(*record["version"])
    shard.version = Version(state.epoch, state.recovered.version)
    state.initialised = True
    state.budget.updates, state.budget.samples = record["updates"], record["samples"]
    state.budget.seconds, state.budget.started = record["elapsed_s"], state.now
    state.diversity = Averages.recall(record.get("diversity"))
    for remembered in record["sessions"]:
        session = Session.recall(remembered, state.now, state.settings.lease_s)
        state.sessions[session.token] = session
        session.buffers = arrays.get(f"buffers.{session.token}")
        if session.order is not None:
            # what the rule waits for must be done, even if it was done before: the order is said again as a new one
            session.last_order = (state.epoch << CONNECTION_BITS) + 1
            session.order = replace(session.order, id=session.last_order)
        if session.live and (state.rule.private or state.keeps_replicas):
            session.anchored = False  # what it holds went on without us
        if session.live and session.anchored:
            _restore_arrays(session, shard.session_arrays().arrays, arrays)


def layout_of(state: ServerState, recovered: Recovered) -> Layout:
    """The model of a checkpoint; raises ConfigError or StateError where this server cannot go on from it."""
    made_by = recovered.record["rule"]
    if made_by != state.settings.rule:
        raise ConfigError(
            f"The checkpoint was made under rule '{made_by}', this server is set to '{state.settings.rule}'.",
            fix=f"Serve with --rule {made_by}, or in another directory.",
        )
    layout = Layout.parse(recovered.record["layout"].encode(), elements_limit=state.settings.max_elements)
    if "center" not in recovered.arrays or recovered.arrays["center"].size != layout.elements:
        raise StateError("The checkpoint's center does not fit its own layout.", fix="Go back to an older checkpoint.")
    return layout


def _restore_arrays(session: Session, made: Any, arrays: dict[str, F32]) -> None:
    """The session's own arrays; under settings that keep other ones the worker re-anchors instead."""
    stored = {name: arrays.get(f"session.{session.token}.{name}") for name in made._fields}
    if any(array is None for array in stored.values()):
        session.anchored = False
        return
    for name, array in made._asdict().items():
        array[:] = stored[name]
    session.arrays = made
