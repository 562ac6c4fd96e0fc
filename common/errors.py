"""Every error of the system, one type per owner of the fault.

    ParamserverError
    ├── UsageError        the caller of our Python API did something it may not
    ├── ConfigError       a setting, flag or file says something impossible
    ├── PeerError         the other side of a connection broke the protocol
    │   ├── WireError     bytes that are no message
    │   ├── CodecError    bytes that are no encoded tensor
    │   └── Refused       the server said no, with a code (see `Code`)
    ├── NetworkError      nobody there, port taken, link lost
    └── StateError        what lies on disk cannot be used

Laws
* A message says what happened, why, and (as `fix`) what to do next.
* A `Code` is the stable name of one cause. It crosses the wire, ends up in the run log and in the counters
  of `status`; the sentence beside it may be bettered at any time, the code may not.
* Each owner has an exit code; `deploy.cli` is the only place that turns one into the other.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar


class Code(StrEnum):
    """Why something was refused."""

    # the message
    MALFORMED = "malformed"  # frames that are no message of ours
    UNEXPECTED = "unexpected"  # a message that makes no sense now
    LIMIT = "limit"  # a limit would be exceeded
    # joining
    PROTOCOL_VERSION = "protocol_version"
    LAYOUT_MISMATCH = "layout_mismatch"
    UNKNOWN_CODEC = "unknown_codec"
    OPTIMIZER = "optimizer"  # the rule does not take this inner optimizer
    FULL = "full"  # no room for another session or model
    EMPTY_SERVER = "empty_server"  # a resuming worker met a server that lost its state
    # the session
    STALE = "stale"  # session unknown, expired, or from another life of the server
    FINISHED = "finished"  # the budget is used up
    DRAINING = "draining"  # the server is stopping
    QUARANTINED = "quarantined"  # too many rejected updates
    # the transfer
    BUSY = "busy"  # no transfer slot free; waiting in order of arrival
    BAD_LENGTH = "bad_length"
    BAD_CHUNK = "bad_chunk"  # missing, repeated or of the wrong size
    TRUNCATED = "truncated"  # committed before the last chunk arrived
    ENCODING = "encoding"  # the codec's own checks failed
    NON_FINITE = "non_finite"  # NaN or infinity in an update
    BASE_VERSION = "base_version"  # based on a version this server never had
    RULE = "rule"  # the rule itself refuses it
    LAG = "lag"  # the center moved too far since the update's base
    DIVERGED = "diverged"  # the center is no longer finite
    # durability
    DEGRADED = "degraded"  # nothing could be saved for too long


def code_of(text: str) -> Code:
    """The code of that name; one from a newer peer counts as UNEXPECTED."""
    return Code(text) if text in set(Code) else Code.UNEXPECTED


class ParamserverError(Exception):
    """Base of all errors raised on purpose. `fix` says what to do next; it may be empty."""

    exit_code: ClassVar[int] = 1

    def __init__(self, sentence: str, *, fix: str = "") -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.sentence} {self.fix}".rstrip()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied as it is, whatever its type asks of those who make one."""
        return type(self).__new__, (type(self), *self.args), vars(self)


class UsageError(ParamserverError):
    """The caller of our Python API did something it may not."""

    exit_code = 2


class ConfigError(ParamserverError):
    """A setting names itself, what is allowed, and the nearest valid name."""

    exit_code = 2


class StateError(ParamserverError):
    """What lies on disk cannot be used: corrupt, of another model, or locked by another server."""

    exit_code = 3


class LockedError(StateError):
    """Another server already owns the state directory."""

    exit_code = 4


class KernelError(ParamserverError):
    """A kernel failed after validation: state may be half changed, the process must end (exit code 5)."""

    exit_code = 5


class NetworkError(ParamserverError):
    """Nobody there, port taken, or link lost."""

    exit_code = 6


class PeerError(ParamserverError):
    """The other side of a connection is at fault; `code` names the cause."""

    exit_code = 7

    def __init__(self, code: Code, sentence: str, *, fix: str = "") -> None:
        super().__init__(sentence, fix=fix)
        self.code = code


class WireError(PeerError):
    """Frames that are no message of ours."""

    def __init__(self, sentence: str, *, code: Code = Code.MALFORMED) -> None:
        super().__init__(code, sentence)


class CodecError(PeerError):
    """Bytes that are no encoded tensor."""

    def __init__(self, sentence: str, *, code: Code = Code.ENCODING) -> None:
        super().__init__(code, sentence)


class Refused(PeerError):
    """The server said no; `code` and the sentence are the server's."""
