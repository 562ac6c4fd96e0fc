"""Those who take part in benchmarks of the data plane: our server and sessions, and peers, in processes of their own.

    way("ipc")                          how frames cross, and whether shared memory takes their place
    served(way, settings)               our server, in a process
    Client(address, way, elements)      one worker's session without a model: exchange(), pull()
    rpc_serve, rpc_join; ray_crowd      the peers that are in more than one benchmark

The center starts at START everywhere and each push adds STEP to all of it, so that what it comes to is known exactly.

Laws
* What each exchange costs a user counts: encoding and decoding do, a training step does not.
* Peers have their defaults, and a lock where several push at one time: ours loses no update either.
* Leases outlast every turn of the others: who is stopped while it waits for its turn is not given up.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed import rpc

from benchmarks import harness
from benchmarks.harness import BenchmarkError, Child, Competitor, Link, child
from common import LIBRARY, shared
from common.buffers import zeros
from common.chunks import Plan
from common.codecs.base import F32, U8
from common.config import ServerSettings
from common.layout import Layout, Tensor
from common.messages import Optimizer, Scalars
from common.query import status
from paramserver.daemon import Daemon
from paramserver.snapshots import BUFFERS
from worker.core import LOSSLESS, WorkerCore
from worker.driver import SWITCH_INTERVAL_S, Driver
from worker.events import Failed, Fetched, InitialWeights, Joined, Leave, NeedWeights, PullWanted, Settled

MB = 1_000_000
START, STEP = 0.5, 1.0
"""Value of the center before the first push, and what each push adds: sums that float32 holds exactly."""
RULE = "downpour"
LEASE_S = 3600.0
TOLERANCE = {"fp32": 0.0, "bf16": 2.0**-8, "int8": 2.0**-20}
"""Of the value, by the codec of the reply: of a vector that is the same everywhere, int8 loses only a rounding."""
RPC, RAY = "torch.distributed.rpc", "Ray actor"


# Ways: the one place that knows how shared memory is switched on and off


class Way(NamedTuple):
    """How a worker reaches its server: kind of the address, and whether tensors take the way through shared memory."""

    name: str
    kind: str
    shared_memory: bool


WAYS = {way.name: way for way in (Way("shm", "ipc", True), Way("ipc", "ipc", False), Way("tcp", "tcp", False))}
NO_SHARED_MEMORY = "shm is left out: no memory can be shared on this system."


def has_shared_memory() -> bool:
    """Whether there is any on this system."""
    return bool(shared.MACHINE)


def ways(say: Callable[[str], None], only: Sequence[str] = ()) -> list[Way]:
    """Those that there are, or of these names; says which one there is not."""
    found = [way for way in WAYS.values() if not only or way.name in only]
    if any(way.shared_memory for way in found) and not has_shared_memory():
        say(NO_SHARED_MEMORY)
        found = [way for way in found if not way.shared_memory]
    return found


def bind(way: Way, folder: str) -> str:
    """An address to listen on."""
    return f"ipc://{folder}/server" if way.kind == "ipc" else "tcp://127.0.0.1:*"


# Our server


@dataclass
class Served:
    """A server in a process of its own."""

    process: Child
    way: Way
    address: str = ""

    def ready(self) -> str:
        """Its address, as soon as it listens."""
        self.address = str(self.process.hear(harness.START_LIMIT_S))
        return self.address

    def status(self) -> dict[str, Any]:
        """What it says of itself."""
        return status(self.address, timeout_s=harness.ROUND_LIMIT_S)

    def checked(self, competitor: Competitor) -> Competitor:
        """The same; its verify also raises where tensors of any worker went another way."""

        def verify() -> None:
            competitor.verify()
            workers = self.status()["workers"]
            if wrong := [one["name"] for one in workers if one["shares_memory"] != self.way.shared_memory]:
                raise BenchmarkError(f"What {', '.join(wrong)} sent did not go by {self.way.name}.")

        return competitor._replace(verify=verify)


@contextmanager
def served(way: Way, settings: Mapping[str, Any]) -> Iterator[Served]:
    """A server with these settings."""
    chosen = {"shared_memory": way.shared_memory} | dict(settings)
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        child(f"paramserver {way.name} server", serve, bind(way, folder), chosen) as server,
    ):
        yield Served(server, way)


def serve(link: Link, address: str, settings: dict[str, Any]) -> None:
    """Runs in that process."""

    def announce(level: str, sentence: str) -> None:
        if level != "info":
            print(f"server: {sentence}", file=sys.stderr)

    link.serve()
    chosen = {"rule": RULE, "drain_s": 1.0, "lease_s": LEASE_S} | settings | {"bind": (address,)}
    Daemon(ServerSettings.model_validate(chosen), announce, link.answer).run()


def pool_mib(elements: int, exchanges: int = 1, codec: str = LOSSLESS, reply_codec: str = LOSSLESS) -> int:
    """The smallest `pool_mib` that holds so many exchanges of a model at once."""
    core = _core("pool", elements)
    up, down = core.plan(codec).bytes, core.plan(reply_codec).bytes
    return -(-(BUFFERS * down + exchanges * (up + down)) // 2**20)


# Our sessions


class Payload(NamedTuple):
    """What is pushed, again and again. delta: (elements,); data: its encoding, which sessions of one process may share
    where it is sent in messages."""

    delta: F32
    data: U8
    codec: str


def payload(elements: int, codec: str = LOSSLESS) -> Payload:
    """An update of STEP everywhere."""
    plan = _core("payload", elements).plan(codec)
    return _filled(plan, zeros(plan.bytes, np.uint8), codec)


def _filled(plan: Plan, data: U8, codec: str) -> Payload:
    in_place = plan.in_place(data)
    delta = zeros(plan.elements, np.float32) if in_place is None else in_place
    delta.fill(STEP)
    return Payload(delta, data, codec)


class Client:
    """A worker's session without a model: it pushes the same update again and again, and holds the last reply."""

    def __init__(self, address: str, way: Way, of: Payload, name: str = "benchmark") -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        elements = of.delta.size
        core = _core(name, elements)
        self._payload, self._plan = of, core.plan(of.codec)
        self._scalars = Scalars(loss=1.0, samples=1, steps=1, lr=0.1)
        self.reply: F32 = zeros(elements, np.float32)
        """(elements,) the center as last received."""
        self._driver = Driver(core, address)
        if way.shared_memory:
            machine = str(self._await(Joined).welcome.settings["machine"])
            self._payload = _filled(self._plan, self._driver.staging(self._plan.bytes, machine), of.codec)
        while not isinstance(first := self._await(NeedWeights, Fetched), Fetched):
            exact = core.plan(LOSSLESS)
            weights = zeros(exact.bytes, np.uint8)
            self.reply.fill(START)
            exact.encode(self.reply, weights)
            self._driver.post(InitialWeights(weights))
        self._base = first.base

    def exchange(self) -> None:
        """Push, and wait for the reply."""
        delta, data, _ = self._payload
        self._driver.push(delta, self._plan, data, self._scalars, self._base, self.reply)
        settled = self._await(Settled)
        if settled.values is None:
            raise BenchmarkError(f"The push was {settled.outcome} ({settled.code}): {settled.sentence}")
        self.reply, self._base = settled.values, settled.base

    def pull(self) -> None:
        """Look at the center as it is now."""
        self._driver.post(PullWanted("evaluate"))
        self.reply = self._await(Fetched).values

    def close(self) -> None:
        """Say Bye."""
        self._driver.post(Leave("the benchmark is over"))
        self._driver.close(harness.END_LIMIT_S)

    def _await(self, *kinds: type[Any]) -> Any:
        """The next news of these kinds; raises where the server says no, or nothing for too long."""
        deadline = time.monotonic() + harness.ROUND_LIMIT_S
        while (left := deadline - time.monotonic()) > 0:
            news = self._driver.news(left)
            if isinstance(news, kinds):
                return news
            if isinstance(news, Failed):
                raise news.error
        names = " or ".join(kind.__name__ for kind in kinds)
        raise BenchmarkError(f"No {names} came within {harness.ROUND_LIMIT_S:g} s.")


def work(link: Link, way: Way, elements: int, codec: str, sessions: int, process: int) -> None:
    """Runs in a process with so many workers: answers windows in which they all exchange as often as they can."""
    address = next(link.requests(), None)
    if address is None:  # the benchmark is gone before it began
        return
    update = payload(elements, codec)
    clients = [Client(address, way, update, f"worker-{process}-{number}") for number in range(sessions)]

    def verify(expected: float) -> None:
        clients[0].exchange()
        check(clients[0].reply, expected, TOLERANCE[LOSSLESS])

    answer_windows(link, [client.exchange for client in clients], verify)
    for client in clients:
        client.close()


def answer_windows(link: Link, exchanges: Sequence[Callable[[], None]], verify: Callable[[float], None]) -> None:
    """The loop of a child with these workers, each of them on a thread."""
    with ThreadPoolExecutor(len(exchanges)) as pool:

        def windows(window_s: float) -> list[list[float]]:
            if len(exchanges) == 1:
                return [harness.window(exchanges[0], window_s)]
            return list(pool.map(lambda exchange: harness.window(exchange, window_s), exchanges))

        answer(link, windows, verify)


def answer(link: Link, windows: Callable[[float], list[list[float]]], verify: Callable[[float], None]) -> None:
    """The loop of a child: `window SECONDS` and `verify EXPECTED`."""
    link.answer("ready")
    for request in link.requests():
        word, _, figure = request.partition(" ")
        if word == "verify":
            verify(float(figure))
            link.answer([])
        else:
            link.answer(windows(float(figure)))


def _core(name: str, elements: int) -> WorkerCore:
    return WorkerCore(
        name=name,
        instance=secrets.token_hex(8),
        library=LIBRARY,
        layout=Layout((Tensor("weight", (1, elements), "float32", "parameter"),)),
        optimizer=Optimizer("SGD", 0.1, 0.0, 1, False, 0.0),
    )


def check_ends(vector: F32, expected: float, tolerance: float = 0.0) -> None:
    """Raise BenchmarkError unless first and last value are `expected`."""
    if not all(abs(value - expected) <= tolerance * abs(expected) for value in (vector[0], vector[-1])):
        raise BenchmarkError(f"The reply holds {vector[0]} and {vector[-1]} at its ends, {expected} expected.")


def check(vector: F32, expected: float, tolerance: float = 0.0) -> None:
    """Raise BenchmarkError unless every value is `expected`."""
    wrong = int(np.count_nonzero(~(np.abs(vector - np.float32(expected)) <= np.float32(tolerance * abs(expected)))))
    if wrong:
        raise BenchmarkError(f"{wrong:,} of {vector.size:,} values are not {expected}.")


# torch.distributed.rpc

_center = torch.zeros(0)
"""The center of the process that serves torch.distributed.rpc."""
_turn = threading.Lock()


def push(delta: torch.Tensor) -> torch.Tensor:
    """Runs in the server, one worker: c <- c + D. delta and result: (elements,) float32."""
    return _center.add_(delta)


def push_in_turn(delta: torch.Tensor) -> torch.Tensor:
    """The same with several workers: no update is lost, and no reply is sent while it changes."""
    with _turn:
        return _center.add_(delta).clone()


def rpc_join(name: str, rank: int, world: int, meeting: str) -> None:
    """Join those who meet at that file."""
    wanted = rpc.TensorPipeRpcBackendOptions(init_method=meeting, rpc_timeout=harness.ROUND_LIMIT_S)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using a Backend")  # torch's own call of torch
        rpc.init_rpc(name, rank=rank, world_size=world, rpc_backend_options=wanted)


def rpc_serve(link: Link, meeting: str, elements: int, world: int = 2) -> None:
    """The process that holds the center."""
    global _center
    link.serve()
    _center = torch.full((elements,), START)
    rpc_join("server", 0, world, meeting)
    while True:
        time.sleep(harness.ROUND_LIMIT_S)


@contextmanager
def meeting() -> Iterator[str]:
    """A file to meet at, so that no port has to be found."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        yield (Path(folder) / "meeting").as_uri()


# Ray


def has_ray() -> bool:
    """Whether it is installed."""
    return find_spec("ray") is not None


def _ray() -> Any:
    """Imported only by who uses it; it need not be there."""
    return import_module("ray")


class _RayCenter:
    def __init__(self, elements: int) -> None:
        self._center = np.full(elements, START, np.float32)

    def push(self, delta: F32) -> F32:
        self._center += delta
        return self._center


class _RayWorker:
    def __init__(self, center: Any, elements: int) -> None:
        self._center = center
        self._delta = np.full(elements, STEP, np.float32)
        self._reply: F32 = np.zeros(0, np.float32)

    def exchange(self) -> None:
        self._reply = _ray().get(self._center.push.remote(self._delta))

    def window(self, window_s: float) -> list[float]:
        return harness.window(self.exchange, window_s)

    def exchanges(self, times: int) -> list[float]:
        return [harness.window(self.exchange, 0.0)[0] for _ in range(times)]

    def verify(self, expected: float) -> bool:
        self.exchange()
        check(self._reply, expected)
        return True


class RayCrowd:
    """A center and workers as actors of a Ray that is started here and ends with this process."""

    def __init__(self, elements: int, workers: int) -> None:
        ray = _ray()
        ray.init(
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}},
        )
        actor = ray.remote(num_cpus=0)
        center = actor(_RayCenter).remote(elements)
        self._workers = [actor(_RayWorker).remote(center, elements) for _ in range(workers)]
        self.exchanges(0)  # they start when they are first asked for something

    def windows(self, window_s: float) -> list[list[float]]:
        """The seconds of each exchange of each worker, all at the same time, for so long."""
        found: list[list[float]] = _ray().get([worker.window.remote(window_s) for worker in self._workers])
        return found

    def exchanges(self, times: int) -> list[list[float]]:
        """The seconds of so many exchanges of each worker."""
        found: list[list[float]] = _ray().get([worker.exchanges.remote(times) for worker in self._workers])
        return found

    def verify(self, expected: float) -> None:
        """Raise unless one more exchange brings that center."""
        _ray().get(self._workers[0].verify.remote(expected))

    def close(self) -> None:
        """End all of it."""
        _ray().shutdown()
