"""What must hold of a push before the center is touched. Each function raises PeerError with a code and a sentence.

The order: frames and types (`common.wire`) -> session and connection (`paramserver.core`) -> `check_begin` -> chunks
one by one, each checked as it lands (`take_chunks`) -> `check_complete` -> apply. A refusal changes no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from common.chunks import Plan
from common.codecs.base import U8
from common.errors import Code, PeerError
from common.messages import Begin, Buffer, Version
from paramserver.session import Transfer


def check_begin(begin: Begin, plans: Sequence[Mapping[str, Plan]], version: Version) -> Plan:
    """The fragment exists, the codec is an agreed one, the length is its formula, the base is a version there was.

    plans: of each fragment, by codec. Returns the plan that the transfer follows.
    """
    if begin.fragment >= len(plans):
        raise PeerError(Code.BAD_CHUNK, f"Fragment {begin.fragment} of {len(plans)} does not exist.")
    plan = plans[begin.fragment].get(begin.codec)
    if plan is None:
        agreed = " or ".join(f"'{codec}'" for codec in plans[begin.fragment])
        raise PeerError(Code.UNKNOWN_CODEC, f"The transfer is in codec '{begin.codec}', agreed is {agreed}.")
    if begin.bytes != plan.bytes:
        raise PeerError(
            Code.BAD_LENGTH, f"The transfer has {begin.bytes:,} bytes; in '{plan.codec}' it has {plan.bytes:,}."
        )
    if begin.base > version:
        raise PeerError(Code.BASE_VERSION, f"The update is based on version {begin.base}; the center is at {version}.")
    return plan


def take_chunks(transfer: Transfer, target: U8, first: int, payload: Buffer) -> None:
    """Check chunk `first` and those that come with it, and put them in their place. target: (plan.bytes or more,)."""
    plan = transfer.plan
    if first >= len(plan.chunks):
        raise PeerError(Code.BAD_CHUNK, f"Chunk {first} of {len(plan.chunks)} does not exist.")
    last, size = first + 1, plan.chunks[first].size
    while size < len(payload) and last < len(plan.chunks):
        size += plan.chunks[last].size
        last += 1
    if size != len(payload):
        raise PeerError(Code.BAD_LENGTH, f"Chunk {first} comes with {len(payload):,} bytes, where no chunk ends.")
    if any(transfer.received[first:last]):
        raise PeerError(Code.BAD_CHUNK, f"Chunk {first}, or one that came with it, arrived twice.")
    plan.take(plan.run(first, last), np.frombuffer(payload, np.uint8), target)
    transfer.received[first:last] = b"\1" * (last - first)


def check_complete(transfer: Transfer) -> None:
    """No chunk is missing."""
    if missing := transfer.received.count(0):
        raise PeerError(
            Code.TRUNCATED, f"Committed with {missing} of {len(transfer.received)} chunks missing; nothing was applied."
        )
