"""Plain values, made thousands of times a second: messages, events, actions, decisions.

    from common.values import dataclass
    @dataclass(frozen=True, slots=True)

Laws
* Nobody changes a value. mypy sees to that, as of any frozen dataclass; at run time nothing does, because a constructor
  that may not assign to what it makes takes five times as long: a tenth of what both cores do for an exchange.
* Equal fields, equal values, equal hashes.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

__all__ = ["dataclass"]

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(*, frozen: bool = False, slots: bool = False):
        """As `dataclasses.dataclass` of a frozen class, but for what happens to who assigns nevertheless."""
        return dataclasses.dataclass(slots=slots, unsafe_hash=frozen)
