"""Which codec a worker's updates travel in, where the server leaves that to it (codec `auto`). Pure.

    fp32  bf16  int8  fp32  bf16  int8 ...      each in turn, ROUNDS times; then one of them for good

An exchange with each is timed: encoding, sending, checking and applying, until the server's answer. Of each the first
time is forgotten (kernels load, windows of the link open), of the others the median counts.

Laws
* The fastest codec is taken, if it earns its loss: if an exchange lasts at most WORTH of what it lasts with the first.
  So noise does not choose, nor does a link that is fast enough.
* In memory that the server reads nothing is sent, so no codec can relieve a link: there it is the first one, at once.
* Each worker chooses for its own link, once a session; what it chose, and why, is one sentence.
* An exchange of which part was repeated on another connection says nothing, and is not counted.

Left out: choosing anew when the link changes; codecs for replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

ROUNDS = 9
"""Exchanges that are timed with each codec; the first one is forgotten."""
WORTH = 0.8
"""A codec that loses something has to save a fifth of the time: with fp32 replies, bf16 saves at most a quarter."""


class Choice:
    """One among `candidates`, from the least lossy on. `codec`: for the next update."""

    def __init__(self, candidates: Sequence[str]) -> None:
        self._times_s: dict[str, list[float]] = {codec: [] for codec in candidates}
        self.codec = candidates[0]
        self.reason = ""
        """Why it is the one; empty until that is known, and where there was no choice."""

    def __repr__(self) -> str:
        return f"<Choice {self.codec}, {'for good' if self.reason else 'of'} {', '.join(self._times_s)}>"

    @property
    def open(self) -> bool:
        """Whether times are still taken."""
        return len(self._times_s) > 1 and not self.reason

    def took(self, seconds: float, *, shared: bool = False) -> None:
        """An exchange with `codec` took so long; `shared`: through memory that the server reads."""
        if not self.open:
            return
        if shared:
            self.codec = next(iter(self._times_s))
            self.reason = f"{self.codec}: updates lie in memory shared with the server, where no link could be relieved"
            return
        self._times_s[self.codec].append(seconds)
        self.codec = min(self._times_s, key=lambda codec: len(self._times_s[codec]))
        if len(self._times_s[self.codec]) == ROUNDS:
            self._decide({codec: median(times[1:]) for codec, times in self._times_s.items()})

    def _decide(self, lasts_s: dict[str, float]) -> None:
        first, fastest = next(iter(lasts_s)), min(lasts_s, key=lambda codec: lasts_s[codec])
        self.codec = fastest if lasts_s[fastest] <= WORTH * lasts_s[first] else first
        others = ", ".join(f"{1e3 * lasts_s[codec]:.3g} ms with {codec}" for codec in lasts_s if codec != self.codec)
        why = "" if self.codec != first else f"; a codec that loses something has to save {1 - WORTH:.0%}"
        self.reason = f"{self.codec}: an exchange takes {1e3 * lasts_s[self.codec]:.3g} ms with it, {others}{why}"
