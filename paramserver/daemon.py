"""The asyncio shell around the server's core: sockets, one timer, threads, files, signals. It decides nothing.

Laws
* Events reach the core one at a time, on the loop; its actions are carried out before the next event.
* The loop never runs a large kernel and never waits for a disk: those are actions whose outcome is an event.
* Start: settings -> lock -> epoch durable -> kernels warm -> recovered state -> socket bound -> ready.
* Stop (SIGTERM, Ctrl-C): what is committed is applied and saved, everybody is told, the process ends within
  `drain_s`, or after the final write. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import uvloop

from common import LIBRARY, rules, shared, transports
from common.codecs.base import BLOCK_ELEMENTS, U8
from common.config import ServerSettings
from common.errors import ConfigError, KernelError, ParamserverError, PeerError, StateError
from common.layout import Layout, Tensor, center_sha256
from common.node import JobDone, Received, Record, Released, Run, Say, Send, Tick, Unsendable
from common.rules.base import Facts, Member, reply_to, sum_of
from common.shared import Memory
from common.transports import lines
from common.transports.lines import Line
from paramserver.arrivals import Begin, End, Started, Stopped
from paramserver.checkpoint import Directory, Loaded, fingerprint
from paramserver.core import (
    Attach,
    Attached,
    Detach,
    Exit,
    Recovered,
    Save,
    Saved,
    SaveFailed,
    ServerCore,
    Stop,
)
from paramserver.kernel_pool import KernelPool
from paramserver.recorder import Recorder, Unrecorded
from paramserver.shard import CENTER, Shard, Work
from paramserver.telemetry import RunLog

BATCH_MESSAGES = 64
"""Messages taken from the socket before the loop may do something else."""
RELEASE_POLL_S = 0.002
"""While the transport reads our buffers, it is asked this often whether it is done."""
CORE_THREADS_LIMIT = 8
WARM_PUSHES = 2
"""Pushes of one worker alone: enough for a rule that does something else with the second."""
SWITCH_INTERVAL_S = 0.0005
"""How long Python lets one thread hold the interpreter: short, so that kernels do not keep the loop waiting."""

Announce = Callable[[str, str], None]
"""announce(level, sentence): how the daemon speaks to the person who watches."""


class Daemon:
    """One server process. `run` returns when it has stopped; an error ends it with the owner's exit code."""

    def __init__(self, settings: ServerSettings, announce: Announce, ready: Callable[[str], None]) -> None:
        if settings.arrivals and settings.directory is None:
            sentence = "What arrives is recorded in the server's directory, and it has none."
            raise ConfigError(sentence, fix="Give it a --directory, or leave --arrivals out.")
        self._settings = settings
        self._announce = announce
        self._ready = ready
        self._failure: BaseException | None = None
        self._core: ServerCore | None = None
        self._recorder: Recorder | Unrecorded = Unrecorded()
        self._exited = False

    def run(self) -> None:
        """Serve until told to stop."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(self._main())

    async def _main(self) -> None:
        settings = self._settings
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        self._signalled = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._signal, number)
        directory = Directory.open(settings.directory) if settings.directory else None
        endpoint = None
        threads = settings.kernel_threads or min(os.cpu_count() or 1, CORE_THREADS_LIMIT)
        self._pool = KernelPool(threads, self._job_done, self._job_failed)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._attaching = ThreadPoolExecutor(1, thread_name_prefix="attach")
        self._shared: dict[bytes, tuple[Memory, Line | None]] = {}
        """By peer, what it reads its replies from, and the line to it."""
        try:
            epoch, loaded = self._recover(directory)
            self._log = RunLog(directory.path if directory else None, settings.max_log_mib << 20)
            self._directory = directory
            warm(settings)
            recovered = Recovered(dict(loaded.arrays), dict(loaded.record)) if loaded else None
            machine = shared.MACHINE if settings.shared_memory and not settings.arrivals else ""
            self._core = ServerCore(settings, epoch=epoch, token=self._token, recovered=recovered, machine=machine)
            self._endpoint = endpoint = transports.listen(settings.bind)
            if settings.arrivals and directory is not None:
                self._recorder = self._record(directory, epoch, loaded)
            self._do(self._recorder.enter(self._core, Started(), time.monotonic()))
            self._timer: asyncio.TimerHandle | None = None
            self._timer_due = 0.0
            self._release_timer: asyncio.TimerHandle | None = None
            self._loop.add_reader(endpoint.fileno(), self._readable)
            for monitor in endpoint.monitors:
                self._loop.add_reader(monitor, endpoint.listen_to_monitor)
            self._ready(endpoint.address)
            self._handle(Tick())
            self._readable()  # descriptors tell of nothing before somebody has looked once
            endpoint.listen_to_monitor()
            await self._stopped.wait()
            self._loop.remove_reader(endpoint.fileno())
            for monitor in endpoint.monitors:
                self._loop.remove_reader(monitor)
        finally:
            self._pool.close()
            self._writer.shutdown(wait=True)
            self._attaching.shutdown(wait=True, cancel_futures=True)
            self._recorder.close(self._last_record)
            if endpoint is not None:
                await asyncio.sleep(0.05)  # let the last goodbyes leave: a line that ends is a loss, and overtakes them
                for peer in list(self._shared):
                    self._unshare(peer)
                endpoint.close()
            if hasattr(self, "_log"):
                self._log.close()
            if directory is not None:
                directory.close()
        if self._failure is not None:
            raise self._failure

    def _recover(self, directory: Directory | None) -> tuple[int, Loaded | None]:
        if directory is None:
            return 1, None
        loaded = directory.load(allow_fresh=self._settings.allow_fresh)
        epoch = directory.next_epoch()
        self._pass_on_warnings(directory)
        return epoch, loaded

    def _record(self, directory: Directory, epoch: int, loaded: Loaded | None) -> Recorder | Unrecorded:
        """The log of what arrives from now on."""
        version, mark = (loaded.version, fingerprint(loaded.arrays, loaded.record)) if loaded else (None, "")
        begin = Begin(LIBRARY, epoch, self._settings.model_dump(mode="json"), version, mark)
        return Recorder.open(directory.path, begin, self._settings.max_arrivals_mib << 20, self._announce)

    def _last_record(self) -> End | Stopped:
        """How this life ended, for the log of arrivals; no kernel runs any more."""
        if not self._exited or self._core is None:
            return Stopped(f"the server failed: {self._failure or 'it could not start'}")
        shard = self._core.shard
        return End(self._core.version, center_sha256(shard.center) if shard else "")

    def _token(self) -> str:
        return self._recorder.drew(secrets.token_hex(12))

    def _pass_on_warnings(self, directory: Directory) -> None:
        warnings, directory.warnings[:] = list(directory.warnings), []
        for sentence in warnings:
            self._announce("warning", sentence)

    # Events in

    def _handle(self, event: Any) -> None:
        """One event through the core, its actions carried out, the timer set."""
        if self._stopped.is_set() or self._core is None:
            return
        try:
            self._do(self._recorder.enter(self._core, event, time.monotonic()))
        except Exception as error:
            self._fail(error)
            return
        self._wake_at(self._core.deadline())

    def _wake_at(self, deadline: float | None) -> None:
        """Have a Tick come then, or earlier: deadlines mostly move away, and one Tick too many costs little."""
        if deadline is None or (self._timer is not None and self._timer_due <= deadline):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = deadline
        self._timer = self._loop.call_later(max(deadline - time.monotonic(), 0.0), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._log.flush()
        self._recorder.flush()
        self._handle_and_receive(Tick())

    def _readable(self) -> None:
        """Take a batch of messages; the descriptor is edge-triggered, and sending uses an edge up too: so come back
        until nothing is left, and nothing was sent since."""
        for _ in range(BATCH_MESSAGES):
            if self._stopped.is_set():
                return
            if (message := self._endpoint.receive()) is not None:
                self._handle(Received(*message))
            elif not self._release():
                return
        self._loop.call_soon(self._readable)

    def _release(self) -> bool:
        """Tell the core which buffers are free again, and whether there were any; ask again soon while some are not."""
        released = self._endpoint.released()
        if released:
            self._handle(Released(released))
        if self._endpoint.holding and self._release_timer is None and not self._stopped.is_set():
            self._release_timer = self._loop.call_later(RELEASE_POLL_S, self._release_again)
        return bool(released)

    def _release_again(self) -> None:
        self._release_timer = None
        if not self._stopped.is_set():
            self._readable()

    def _job_done(self, event: JobDone) -> None:
        self._loop.call_soon_threadsafe(self._handle_and_receive, event)

    def _handle_and_receive(self, event: Any) -> None:
        self._handle(event)
        if not self._stopped.is_set():
            self._readable()  # sending may have used up the descriptor's edge

    def _job_failed(self, error: BaseException) -> None:
        self._loop.call_soon_threadsafe(self._fail, error)

    def _signal(self, number: int) -> None:
        self._signalled += 1
        if self._signalled > 1:
            os._exit(130)
        if self._core is None:  # still starting: there is nothing to finish
            self._stopped.set()
            return
        self._handle_and_receive(Stop(signal.Signals(number).name))
        self._loop.call_later(self._settings.drain_s, self._drained_too_long)

    def _drained_too_long(self) -> None:
        if not self._stopped.is_set():
            self._announce("warning", f"Still not drained after {self._settings.drain_s:g} s; only saving goes on.")

    # Actions out

    def _do(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case Send(peer, frames, hold):
                    if refusal := self._endpoint.send(peer, frames, hold):
                        if hold:
                            self._loop.call_soon(self._handle, Released((hold,)))
                        self._loop.call_soon(self._handle_and_receive, Unsendable(peer, refusal))
                case Run():
                    if (done := self._run(action)) and self._core is not None:
                        self._do(self._recorder.enter(self._core, done, time.monotonic()))
                case Record(kind, values):
                    self._log.write(kind, values)
                case Say(level, sentence):
                    self._announce(level, sentence)
                case Attach():
                    self._attaching.submit(self._attach, action)
                case Detach(peer):
                    self._unshare(peer)
                case Save():
                    self._recorder.flush()
                    self._writer.submit(self._save, action)
                case Exit():
                    self._exited = True
                    self._stopped.set()

    def _run(self, job: Run) -> JobDone | None:
        try:
            return self._pool.run(job)
        except Exception as error:
            raise KernelError(
                f"A kernel failed after validation ({type(error).__name__}: {error}); the state may be half changed.",
                fix="Restart the server: it goes on from its last checkpoint.",
            ) from error

    def _save(self, save: Save) -> None:
        """On the writer's thread."""
        assert self._directory is not None
        event: Saved | SaveFailed
        self._recorder.settle()
        try:
            seconds = self._directory.save(save.version, save.arrays, save.record, keep=self._settings.keep_checkpoints)
            event = Saved(save.version, seconds)
            self._loop.call_soon_threadsafe(self._pass_on_warnings, self._directory)
        except StateError as error:
            event = SaveFailed(str(error))
        except Exception as error:  # a checkpoint that fails, for whatever reason, never stops training
            event = SaveFailed(f"{type(error).__name__}: {error}.")
        self._loop.call_soon_threadsafe(self._handle_and_receive, event)

    # Shared memory

    def _attach(self, wanted: Attach) -> None:
        """On a thread of its own: mapping many pages takes as long as copying them."""
        try:
            theirs = shared.attach(wanted.place, expect=wanted.update_bytes)
            mine = Memory.make(wanted.reply_bytes)
            line = lines.dial(wanted.place.mark, mine.place.mark)
        except (shared.CannotAttach, StateError) as error:
            failed = Attached(wanted.peer, wanted.session, wanted.connection, None, None, str(error))
            self._loop.call_soon_threadsafe(self._handle_and_receive, failed)
        else:
            self._loop.call_soon_threadsafe(self._attached, wanted, theirs, mine, line)

    def _attached(self, wanted: Attach, theirs: U8, mine: Memory, line: Line | None) -> None:
        if self._stopped.is_set():
            mine.withdraw()
            if line is not None:
                line.close()
            return
        peer = wanted.peer
        self._unshare(peer)
        self._shared[peer] = mine, line
        self._endpoint.share(peer, mine, (bytes.fromhex(wanted.place.mark), theirs), line)
        if line is not None:
            self._loop.add_reader(line.fileno(), self._line_readable, peer, line)
        self._handle_and_receive(Attached(peer, wanted.session, wanted.connection, mine.data, mine.place))

    def _line_readable(self, peer: bytes, line: Line) -> None:
        """Take one message: the next of all lines that have one come first, or whoever answers fast is served alone."""
        if (message := self._endpoint.receive_from(peer)) is not None:
            self._handle(Received(*message))
        if line.ended:
            self._loop.remove_reader(line.fileno())
        if self._endpoint.overlooked:
            self._readable()

    def _unshare(self, peer: bytes) -> None:
        mine, line = self._shared.pop(peer, (None, None))
        if line is not None:
            self._loop.remove_reader(line.fileno())
        self._endpoint.unshare(peer)
        if mine is not None:
            mine.withdraw()

    def _fail(self, error: BaseException) -> None:
        """Nothing sensible can go on: end without saving what may be half changed."""
        if self._failure is None:
            self._failure = (
                error
                if isinstance(error, ParamserverError)
                else KernelError(
                    f"The server failed: {type(error).__name__}: {error}.",
                    fix="Restart it: it goes on from its last checkpoint. Please report this.",
                )
            )
            self._failure.__cause__ = error if error is not self._failure else None
        self._stopped.set()


def warm(settings: ServerSettings) -> None:
    """Compile or load every kernel these settings use, before anybody waits for one."""
    layout = Layout(
        (
            Tensor("body", (64, 64), "float32", "parameter"),
            Tensor("dense", (7,), "float32", "parameter"),
            Tensor("buffer", (3,), "float32", "buffer"),
        )
    )
    rule, config = rules.load(settings.rule), settings.rule_config()
    vector = np.zeros(64, np.float32)
    lying = vector.copy()
    lying.flags.writeable = False  # as the memory of workers is
    sent = np.zeros(vector.nbytes + 1, np.uint8)[1:].view(np.float32)  # as messages come, at any address
    for tried in (lying, sent):
        sum_of(vector, tried, np.float32(1.0), vector.copy(), vector.copy(), 0)
    shard = Shard(
        layout,
        rule,
        config,
        settings.terms(),
        codec=settings.codec,
        reply_codec=settings.reply_codec,
        replies=settings.replies,
        epoch=0,
    )
    scratch = np.zeros(BLOCK_ELEMENTS, np.float32)

    def run(work: Work) -> None:
        work.run(0, work.parts, scratch)

    exact = np.zeros(shard.exact.bytes, np.uint8)
    for chunk in shard.exact.chunks:
        shard.exact.take(chunk, exact[chunk.offset : chunk.offset + chunk.size].copy(), exact)
    run(shard.load_work(exact))
    session, replica = shard.session_arrays()
    run(shard.read_work(np.zeros(shard.down.bytes, np.uint8), CENTER, None, session, "anchor", replica))
    decisions, _ = rule.join(config, shard.decisions, Member("warm"), 0.0)
    for fragment, up in ((fragment, up) for fragment, ups in enumerate(shard.ups) for up in ups.values()):
        update, reply = np.zeros(up.bytes, np.uint8), np.zeros(shard.downs[fragment].bytes, np.uint8)
        up.encode(shard.center, update)
        for chunk in up.chunks:
            payload = update[chunk.offset : chunk.offset + chunk.size].copy()
            up.take(chunk, payload, update)
            payload.flags.writeable = False  # as the memory of workers is
            up.take(chunk, payload, update)
        for number in range(1, WARM_PUSHES + 1):
            facts = Facts("warm", number, 1, 0, 0.0, 1, 0.1, 0.0, fragment)
            try:
                decisions, effects = rule.admit(config, decisions, facts)
            except PeerError:  # under a rule that schedules, nobody pushes unasked
                break
            answer = reply_to("warm", effects)
            buffers = [np.zeros(3, np.float32)]
            run(shard.push_work(fragment, up, update, session, effects, answer, reply, buffers, replica))
