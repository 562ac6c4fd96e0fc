"""What must hold of a push before the center is touched. Each function raises PeerError with a code and a sentence.

The order: frames and types (`common.wire`) -> session and connection (`paramserver.core`) -> `check_begin` -> chunks
one by one, each checked as it lands (`take_chunk`) -> `check_complete` -> apply. A refusal changes no state.
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


def take_chunk(transfer: Transfer, target: U8, index: int, payload: Buffer) -> None:
    """Check chunk `index` and put it in its place. target: (plan.bytes or more,)."""
    plan = transfer.plan
    if index >= len(plan.chunks):
        raise PeerError(Code.BAD_CHUNK, f"Chunk {index} of {len(plan.chunks)} does not exist.")
    if transfer.received[index]:
        raise PeerError(Code.BAD_CHUNK, f"Chunk {index} arrived twice.")
    chunk = plan.chunks[index]
    if len(payload) != chunk.size:
        raise PeerError(Code.BAD_LENGTH, f"Chunk {index} has {len(payload):,} bytes, {chunk.size:,} expected.")
    plan.take(chunk, np.frombuffer(payload, np.uint8), target)
    transfer.received[index] = 1


def check_whole(plan: Plan, payload: Buffer) -> U8:
    """What lies in shared memory, as long as it must be; its values are checked as they are taken from there."""
    if len(payload) != plan.bytes:
        raise PeerError(Code.BAD_LENGTH, f"The update lies in {len(payload):,} bytes, {plan.bytes:,} expected.")
    return np.frombuffer(payload, np.uint8)


def check_complete(transfer: Transfer) -> None:
    """No chunk is missing."""
    if missing := transfer.received.count(0):
        raise PeerError(
            Code.TRUNCATED, f"Committed with {missing} of {len(transfer.received)} chunks missing; nothing was applied."
        )
