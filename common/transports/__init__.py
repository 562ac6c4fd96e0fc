"""Ways for frames to cross: tcp:// and ipc:// by ZeroMQ, shared memory beside it, memory (in process, for tests).

endpoint = transports.listen(["tcp://127.0.0.1:0"])          endpoint = transports.dial("tcp://host:5555")
"""

from collections.abc import Sequence

from common.transports import zeromq
from common.transports.sharing import SharingEndpoint

__all__ = ["SharingEndpoint", "dial", "listen"]


def listen(addresses: Sequence[str]) -> SharingEndpoint:
    """Bound to every address; raises NetworkError where one is taken or cannot be."""
    return SharingEndpoint(zeromq.listen(addresses))


def dial(address: str) -> SharingEndpoint:
    """Connected to `address`, or soon; silence tells that nobody is there. Raises NetworkError for no address."""
    return SharingEndpoint(zeromq.dial(address))
