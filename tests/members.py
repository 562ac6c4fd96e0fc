"""Lives for the tests of the nursery: what a family prepares, and what its members do."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable

MEMORY = list[str]()


def prepare(word: str) -> Callable[[int], None]:
    """Members know the word, and do what they are told."""
    MEMORY.append(word)

    def live(line: int) -> None:
        with socket.socket(fileno=line) as told:
            while order := told.recv(100).decode():
                match order:
                    case "say":
                        told.send(f"{MEMORY} {os.getpid()} {os.getppid()}".encode())
                    case "exit":
                        sys.exit(7)
                    case "crash":
                        os.kill(os.getpid(), signal.SIGSEGV)
                    case "raise":
                        raise ValueError("as it was told")

    return live


def refuse() -> Callable[[], None]:
    """A family that cannot be prepared."""
    raise ValueError("no such family")
