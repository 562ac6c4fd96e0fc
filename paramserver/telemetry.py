"""The run log: one JSON line per event, for reports and for people with `grep`.

Laws
* A line is `{"time": seconds since 1970, "kind": ..., ...plain values}`; a value that is not finite becomes null.
* The log never grows over its limit: at half of it the file is set aside as `run.1.jsonl`, and the one before goes.
* Losing the log loses nothing else: a disk that is full silences it, once, with a warning line at the end of the run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

FILE, PREVIOUS = "run.jsonl", "run.1.jsonl"
BUFFER_LINES = 256


class RunLog:
    """Appends to `run.jsonl` in `directory`, or does nothing where there is none."""

    def __init__(self, directory: Path | None, limit_bytes: int, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._path = directory / FILE if directory else None
        self._limit_bytes = limit_bytes
        self._lines: list[str] = []
        self._file: TextIO | None = self._path.open("a", encoding="utf-8") if self._path else None
        self.lost_lines = 0

    def write(self, kind: str, values: dict[str, Any]) -> None:
        """One line; it reaches the file with the next flush, or when enough have gathered."""
        if self._file is None:
            return
        plain = {"time": round(self._clock(), 6), "kind": kind} | {
            name: _finite(value) for name, value in values.items()
        }
        self._lines.append(json.dumps(plain))
        if len(self._lines) >= BUFFER_LINES:
            self.flush()

    def flush(self) -> None:
        """Everything so far into the file."""
        if self._file is None or not self._lines:
            return
        lines, self._lines = self._lines, []
        try:
            self._file.write("\n".join(lines) + "\n")
            self._file.flush()
            if self._file.tell() > self._limit_bytes // 2:
                self._rotate()
        except OSError:
            self.lost_lines += len(lines)

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if self._file is None:
            return
        if self.lost_lines:
            self.write("log_lost", {"lines": self.lost_lines})
        self.flush()
        self._file.close()
        self._file = None

    def _rotate(self) -> None:
        assert self._file is not None and self._path is not None
        self._file.close()
        self._path.replace(self._path.with_name(PREVIOUS))
        self._file = self._path.open("a", encoding="utf-8")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
