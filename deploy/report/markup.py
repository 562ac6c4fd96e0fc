"""What the page is made of: elements that escape their text, and figures as people read them. Pure.

Laws
* All markup is made by `tag`, which escapes every text that is not markup itself.
* A figure that is not known is UNKNOWN, whatever its kind.

Left out: which elements and figures the page has (`page`, `charts`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any

UNKNOWN = "\N{EN DASH}"
SCALES: Mapping[str, Sequence[tuple[float, float, str]]] = {
    "time_s": ((172_800, 86_400, "d"), (7200, 3600, "h"), (120, 60, "min"), (0, 1, "s")),
    "bytes": ((1e12, 1e12, "TB"), (1e9, 1e9, "GB"), (1e6, 1e6, "MB"), (1e3, 1e3, "kB"), (0, 1, "B")),
    "updates": ((2e6, 1e6, "M"), (2e4, 1e3, "k"), (0, 1, "")),
    "percent": ((-math.inf, 0.01, "%"),),
}
"""Kind of value -> (from what size on, unit, its name); any other kind stands as it is."""


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, *inside: str | Iterable[str], **attributes: Any) -> Html:
    """An element. Text inside is escaped unless it is Html; so are attributes (`class_`, `aria_label`)."""
    words = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return Html(f"<{name}{words}>{together(*inside)}</{name}>")


def together(*parts: str | Iterable[str]) -> Html:
    """Parts one after the other, text among them escaped."""
    texts = (text for part in parts for text in ([part] if isinstance(part, str) else part))
    return Html("".join(text if isinstance(text, Html) else escape(text) for text in texts))


# Figures as people read them


def unit_of(value: float, kind: str) -> tuple[float, str]:
    """The unit to show a value of a kind of `SCALES` in, and its name: (1, "") where it has none."""
    return next(((unit, name) for least, unit, name in SCALES.get(kind, ()) if value >= least), (1, ""))


def _scaled(value: float | None, kind: str, form: str) -> str:
    if value is None:
        return UNKNOWN
    unit, name = unit_of(value, kind)
    return f"{value / unit:{form}} {name}".strip()


percent = partial(_scaled, kind="percent", form=".1f")
duration = partial(_scaled, kind="time_s", form=".1f")
size = partial(_scaled, kind="bytes", form=".3g")
short = partial(_scaled, kind="", form=".3g")


def count(value: float | None) -> str:
    """A whole number, its thousands set apart."""
    return UNKNOWN if value is None else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def text(value: Any) -> str:
    """Any plain value: texts as they are, all others as JSON."""
    return value if isinstance(value, str) else UNKNOWN if value is None else json.dumps(value)
