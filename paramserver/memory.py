"""What the server needs, in bytes: a sum that is stated before it is used, and kept to.

center + rule state + sessions x (rule, buffers) + pool (slots, snapshots) + checkpoint shadow + second center
+ sessions x replica, where replies are differences: in no checkpoint, so without a shadow
+ workers of this machine x (their updates, our replies) that lie in memory shared with them
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from common import chunks, codecs, rules
from common.config import ServerSettings
from common.layout import Layout
from common.rules.base import add_update
from paramserver.shard import LOSSLESS, keeps_replicas, tries_updates
from paramserver.slots import slot_count
from paramserver.snapshots import BUFFERS

FLOAT_BYTES = 4


class MemoryPlan(NamedTuple):
    """Bytes of each part."""

    center: int
    second: int
    """The center that is made while an update is checked, where that comes whole."""
    rule_state: int
    per_session: int
    arrays: int
    """Of that, what the rule keeps."""
    replica: int
    """Of each session too, and in no checkpoint: what its worker holds, where replies are differences."""
    slots: int
    per_slot: int
    snapshots: int
    pool: int
    shared: int
    """Of each worker with which memory is shared: its own that is mapped, and that of its replies."""
    saved: bool
    """Whether there is a checkpoint shadow: a second copy of center, rule state and sessions."""

    def total(self, sessions: int, sharing: int = 0) -> int:
        """Bytes with that many workers, of which so many share memory with the server."""
        state = self.center + self.rule_state + sessions * self.per_session
        state *= 2 if self.saved else 1
        return state + self.second + sessions * self.replica + self.pool + sharing * self.shared

    def sentence(self, sessions: int) -> str:
        """The sum in words, for `serve`."""
        shadow = " twice, for checkpoints," if self.saved else ""
        second = f" + next center {_mib(self.second)}" if self.second else ""
        replicas = f" + {sessions} replicas x {_mib(self.replica)}" if self.replica else ""
        return (
            f"Memory: center {_mib(self.center)} + rule {_mib(self.rule_state)} + {sessions} workers x "
            f"{_mib(self.per_session)}{shadow}{replicas} + pool {_mib(self.pool)} ({self.slots} exchanges at once)"
            f"{second} = "
            f"{_mib(self.total(sessions))}; {_mib(self.shared)} more for each that shares memory."
        )


def plan(settings: ServerSettings, layout: Layout) -> MemoryPlan:
    """The memory a model needs under these settings; raises ConfigError where the pool holds not one exchange."""
    rule = rules.load(settings.rule)
    config = settings.rule_config()
    cut = partial(chunks.plan, layout, rows=codecs.at_rows(settings.codec, settings.reply_codec))
    ups = [cut(codec) for codec in codecs.choices(settings.codec)]
    up_bytes = max(up.bytes for up in ups)
    down = cut(settings.reply_codec)
    whole = down if settings.replies == "whole" else cut(LOSSLESS)
    vector = FLOAT_BYTES * layout.parameters
    session_vectors = _vectors(rule.session(config, settings.overlap, 1, "float32"))
    snapshots = BUFFERS * whole.bytes
    shares = settings.shared_memory and not settings.arrivals
    count = slot_count((settings.pool_mib << 20) - snapshots, up_bytes + down.bytes, settings.max_sessions)
    return MemoryPlan(
        center=FLOAT_BYTES * layout.elements,
        second=FLOAT_BYTES * layout.elements if tries_updates(rule, config, ups, down, layout, shares=shares) else 0,
        rule_state=_vectors(rule.state(config, settings.overlap, 1, "float32")) * vector,
        per_session=session_vectors * vector + FLOAT_BYTES * layout.buffers,
        arrays=session_vectors * vector,
        replica=vector if keeps_replicas(rule, settings.replies) else 0,
        slots=count,
        per_slot=up_bytes + down.bytes,
        snapshots=snapshots,
        pool=count * (up_bytes + down.bytes) + snapshots,
        shared=up_bytes + down.bytes,
        saved=settings.directory is not None,
    )


def before_the_model(settings: ServerSettings) -> str:
    """The sum as far as it is known before the first worker brings a model of N parameters."""
    rule = rules.load(settings.rule)
    config = settings.rule_config()
    vectors = 1 + _vectors(rule.state(config, settings.overlap, 1, "float32"))
    arrays = _vectors(rule.session(config, settings.overlap, 1, "float32"))
    shadow = "2 x " if settings.directory else ""
    tries = rule.apply is add_update
    second = " + 4N bytes for the next center, where updates and replies are plain and come whole," if tries else ""
    replicas = " + W x 4N bytes for replicas" if keeps_replicas(rule, settings.replies) else ""
    return (
        f"Memory for a model of N parameters and W workers: {shadow}({vectors} + W x {arrays}) x 4N bytes{replicas}"
        f"{second}"
        f" + a pool of at most {settings.pool_mib} MiB for transfers."
    )


def _vectors(arrays: Any) -> int:
    """How many vectors of the model's length, from arrays made for a length of one."""
    return sum(array.size for array in arrays)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
