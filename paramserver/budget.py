"""When training is over: after so many updates, samples or seconds, whichever comes first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Budget:
    """Limits (None: none) and what was used up. Samples and updates count what was applied."""

    updates_limit: int | None = None
    samples_limit: int | None = None
    seconds_limit: float | None = None
    updates: int = 0
    samples: int = 0
    seconds: float = 0.0
    """Training time of earlier lives of the server."""
    started: float | None = None
    """Monotonic seconds when the first center of this life was there."""
    ended: float | None = None
    """Monotonic seconds when training was over: from then on the clock stands still."""

    def elapsed_s(self, now: float) -> float:
        """Training time so far, over all lives of the server."""
        if self.started is None:
            return self.seconds
        return self.seconds + (now if self.ended is None else self.ended) - self.started

    def end(self) -> float | None:
        """When the time is used up (monotonic seconds), or None."""
        if self.seconds_limit is None or self.started is None:
            return None
        return self.started + self.seconds_limit - self.seconds

    def used_up(self, now: float) -> str:
        """Why training is over, or ''."""
        if self.updates_limit is not None and self.updates >= self.updates_limit:
            return f"the budget of {self.updates_limit:,} updates is used up"
        if self.samples_limit is not None and self.samples >= self.samples_limit:
            return f"the budget of {self.samples_limit:,} samples is used up"
        return self.time_is_up(now)

    def time_is_up(self, now: float) -> str:
        """The same, as far as time is concerned."""
        if self.seconds_limit is not None and self.elapsed_s(now) >= self.seconds_limit:
            return f"the budget of {self.seconds_limit:g} s is used up"
        return ""

    def share(self, now: float) -> float:
        """How much of the tightest limit is used, 0 to 1."""
        shares = [0.0]
        if self.updates_limit:
            shares.append(self.updates / self.updates_limit)
        if self.samples_limit:
            shares.append(self.samples / self.samples_limit)
        if self.seconds_limit:
            shares.append(self.elapsed_s(now) / self.seconds_limit)
        return min(max(shares), 1.0)
