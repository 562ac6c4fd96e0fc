"""Ways for frames to cross: tcp:// by ZeroMQ, ipc:// by Unix sockets, shared memory beside both; in tests, memory.

endpoint = transports.listen(["tcp://127.0.0.1:0"])          endpoint = transports.dial("tcp://host:5555")
"""

from collections.abc import Sequence
from contextlib import ExitStack

from common.transports import unix, zeromq
from common.transports.base import Sockets
from common.transports.paths import SCHEME
from common.transports.several import Several
from common.transports.sharing import SharingEndpoint

__all__ = ["SharingEndpoint", "dial", "listen"]


def listen(addresses: Sequence[str]) -> SharingEndpoint:
    """Bound to every address; raises NetworkError where one is taken or cannot be."""
    paths = [address for address in addresses if _is_path(address)]
    others = [address for address in addresses if not _is_path(address)]
    found: list[Sockets] = []
    with ExitStack() as unused:
        for path in paths:
            found.append(unix.listen(path))
            unused.callback(found[-1].close)
        if others:  # the first address of all is the one that is told
            found.insert(len(paths) if _is_path(addresses[0]) else 0, zeromq.listen(others))
        unused.pop_all()
    return SharingEndpoint(found[0] if len(found) == 1 else Several(found))


def dial(address: str) -> SharingEndpoint:
    """Connected to `address`, or soon; silence tells that nobody is there. Raises NetworkError for no address."""
    return SharingEndpoint(unix.dial(address) if _is_path(address) else zeromq.dial(address))


def _is_path(address: str) -> bool:
    return address.startswith(SCHEME)
