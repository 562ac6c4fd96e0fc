"""The SDK: join a server, and call `step` after each optimizer step of your own loop.

    with join("tcp://host:5555", model, optimizer) as session:
        ...
        session.step(loss, samples=len(x))

Laws
* Every optimizer step ends up in exactly one push: D = x - anchor, and the anchor is what the last merge took from
  the server, before progress made in flight is added on top: x <- reply + (x now - x at push), anchor <- reply. Under a
  rule whose workers keep parameters of their own, the anchor is what the server knows of them.
* The server decides rule, codec, local steps and overlap; they arrive at join. Under a rule that schedules it also says
  when to train, upload and pull.
* Optimizer state is the worker's own: no merge touches it.
* What a codec with feedback loses of a push is added to the next one, and only if the server took the former. Where
  there is a choice of codecs (`worker.choosing`) and one of them has feedback, all have it: so nothing is left behind.
* While the server is away, `step` returns at once and training goes on; what is trained meanwhile is pushed later.
* The model is only touched inside `step`, `global_model` and at the ends, on the caller's thread.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import torch

from common import LIBRARY, codecs, rules
from common.binding import Binding, layout_of
from common.buffers import zeros
from common.chunks import Plan, plan
from common.codecs import draws
from common.codecs.base import F32, U8
from common.codecs.feedback import Memory
from common.errors import Code, CodecError, NetworkError, Refused, UsageError
from common.messages import NOWHERE, Optimizer, Order, Scalar, Scalars, Version
from common.rules.base import OptimizerFacts
from common.wire import PAYLOAD_BYTES
from worker import core
from worker.choosing import Choice
from worker.core import PullWanted, WorkerCore
from worker.diversity import Gradients, Meter
from worker.driver import Machine

NAME_CHARACTERS = 64
PATIENCE_S = 10.0
"""Waits longer than this are spoken of."""
REJECTED_IN_A_ROW = 10
"""So many updates that could not be pushed end the training: nothing would come of it."""
log = logging.getLogger("paramserver.worker")


def join(
    address: str,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    name: str | None = None,
    group: int | None = None,
    connect_timeout_s: float = 30.0,
    machine: Machine | None = None,
) -> Session:
    """Join the server at `address` with this model; returns when the model holds the server's center.

    The first worker of a fresh server supplies the initial weights, all others adopt the center. `group`: which one to
    be in, from 0, under a rule that has groups; None leaves it to the server. `machine`: where this runs, for
    simulators. Raises NetworkError where nobody answers within `connect_timeout_s`, Refused where the server says no,
    UsageError for a model that cannot be exchanged.
    """
    return Session(
        address, model, optimizer, name=name, group=group, connect_timeout_s=connect_timeout_s, machine=machine
    )


@dataclass(slots=True)
class Progress:
    """What was trained since the last push."""

    steps: int = 0
    samples: int = 0
    loss_sum: float = 0.0

    def add(self, other: Progress) -> None:
        self.steps += other.steps
        self.samples += other.samples
        self.loss_sum += other.loss_sum


@dataclass(slots=True)
class Exchanges:
    """What the exchanges of this worker cost so far, for its report."""

    pushed: int = 0
    rejected: int = 0
    stalled_s: float = 0.0
    """Time `step` waited for the server."""
    hidden: int = 0
    """Exchanges that were over before anybody waited for them."""
    bytes_up: int = 0
    bytes_down: int = 0
    away: int = 0
    """Times the server was away."""
    undone: int = 0
    """Pushes that were applied and that a crash of the server undid."""
    choice: str = ""
    """The codec that was chosen for updates, and why; empty where the server left no choice, or it is still open."""


@dataclass(slots=True)
class _InFlight:
    """A push that is not settled. x: (elements,) the parameters at the push; `part`: the elements that were pushed;
    since: when it began to be encoded, seconds."""

    x: F32
    progress: Progress
    part: slice
    at_step: int
    since: float


class Session:
    """A worker's place at a server. Made by `join`; a context manager that says Bye."""

    def __init__(
        self,
        address: str,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        name: str | None = None,
        group: int | None = None,
        connect_timeout_s: float = 30.0,
        machine: Machine | None = None,
    ) -> None:
        if name is not None and not 0 < len(name) <= NAME_CHARACTERS:
            raise UsageError(f"A worker's name has 1 to {NAME_CHARACTERS} characters, not {len(name)}.")
        self._address = address
        self._model = model
        self._optimizer = optimizer
        self._layout = layout_of(model)
        if len(self._layout.describe()) > PAYLOAD_BYTES:
            raise UsageError(f"The model has {len(self._layout.tensors):,} tensors; their names do not fit a message.")
        self._binding = Binding(model, self._layout)
        self._parameters = self._layout.parameters
        elements = self._layout.elements
        # x: the parameters as last gathered; anchor: what the last merge took; spare: the next x while one is in flight
        self._x, self._anchor, self._spare, self._scratch = (zeros(elements, np.float32) for _ in range(4))
        self._outlived: F32 | None = None
        """The anchor before the last merge: memory for the next reply."""
        self._base: Version = NOWHERE
        self._in_flight: _InFlight | None = None
        self._progress = Progress()
        self._discard = False
        self._reanchoring = True
        self._rejected_in_a_row = 0
        self._away = False
        self._left = False
        self._evaluated: core.Fetched | None = None
        self._order: Order | None = None
        """What the server last said is next, under a rule that schedules."""
        self._early: core.Settled | None = None
        """A reply that is here before the rule wants it merged."""
        self._pulled: core.Fetched | None = None
        self._memory: Memory | None = None
        """What the codec lost of the pushes so far, where it feeds that back."""
        self._encoded = 0
        """Pushes that were encoded, of all sessions."""
        self._loss = 0.0
        self._samples = 0
        self._meter = Meter(model.parameters())
        self.finished = False
        self.steps = 0
        self.exchanges = Exchanges()
        machine = machine or Machine.this()
        self._now = machine.now
        self._core = WorkerCore(
            name=name or f"{machine.host}-{machine.process}",
            instance=machine.instance,
            library=LIBRARY,
            layout=self._layout,
            optimizer=_facts(optimizer),
            host=machine.host,
            group=group,
        )
        self._binding.gather(self._x)
        self._driver = machine.carry(self._core, address)
        try:
            self._join(connect_timeout_s)
        except BaseException:
            self._part("could not join", timeout_s=1.0)
            raise

    def __repr__(self) -> str:
        return f"<Session {self.name} at {self._address}, step {self.steps}, version {self._base}>"

    @property
    def name(self) -> str:
        """The name this worker goes by on the server."""
        return self._core.membership.worker

    @property
    def settings(self) -> Mapping[str, Scalar]:
        """What the server decided and this worker adopted: rule, codecs, local steps, overlap ..."""
        welcome = self._core.membership.welcome
        return MappingProxyType(welcome.settings if welcome else {})

    @property
    def lag_versions(self) -> int:
        """How far the center had moved, when it was last heard of, since this worker took it."""
        return self._core.membership.known.version - self._base.version

    @property
    def version(self) -> Version:
        """(epoch, version) of the center last merged."""
        return self._base

    # The loop

    def step(self, loss: torch.Tensor | float, samples: int, *, stepped: bool = True) -> None:
        """Call after each optimizer step. loss: mean loss of the batch; samples: its size.

        `stepped=False` says that the optimizer skipped this step (as a gradient scaler may): it counts as none.
        Exchanges with the server when it is due; raises Refused if the server throws this worker out.
        """
        if self._left:
            raise UsageError("This session is over.", fix="Join again.")
        if stepped:
            self.steps += 1
            self._loss = float(loss.detach()) if isinstance(loss, torch.Tensor) else float(loss)
            self._progress.add(Progress(1, samples, self._loss))
            self._samples += samples
            self._meter.stepped(self.steps, samples)
            diversity = self._meter.take() if self._rule.schedules else None
            self._driver.post(core.Progress(self.steps, self._samples, self._loss, diversity=diversity))
        else:
            self._meter.skipped()
        self._take_news()
        if self._in_flight is not None and 0 < self._delay <= self.steps - self._in_flight.at_step:
            self._wait_until_settled()
        if self._rule.schedules:
            self._obey()
        elif self._progress.steps >= self._rule.local_steps(self._config, self._local_steps, self._done):
            self._exchange()

    # Gradient diversity

    @property
    def measures(self) -> bool:
        """Whether the step to come is one in which gradient diversity is measured."""
        return self._meter.due and not self._left

    def split(
        self, loss_a: torch.Tensor, loss_b: torch.Tensor, *, samples: tuple[int, int] | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        """Call in place of `loss.backward()`, with the mean losses of both halves of a batch; returns the mean loss of
        the batch, () without graph.

        Now and then it measures gradient diversity on the way. The losses may share a graph. samples: of each half,
        where they differ; without, both hold half of what `step` is told. scale: that of a GradScaler
        (`scaler.get_scale()`), which the gradients are multiplied by. Raises UsageError for a half without samples.
        """
        return self._meter.split(loss_a, loss_b, samples, scale)

    def micro_batch(self, samples: int, *, scale: float = 1.0) -> None:
        """Call after each backward pass where a step gathers the gradients of several micro-batches of one size.

        samples: those of the micro-batch. The gradients are empty, or zero, when a step begins. scale: as in `split`.
        """
        self._meter.micro_batch(samples, scale)

    def measure(self, loss_a: torch.Tensor, loss_b: torch.Tensor, samples: tuple[int, int]) -> None:
        """Measure gradient diversity with the mean losses of two halves of a batch, and touch no gradient.

        For whoever leaves its own backward pass as it is; only worth its time where `measures` says so.
        """
        self._meter.measure(loss_a, loss_b, samples)

    def measure_gradients(self, g_a: Gradients, g_b: Gradients, samples: tuple[int, int]) -> None:
        """The same with mean gradients that are there already, one for each trainable parameter."""
        self._meter.gradients(g_a, g_b, samples)

    # Exchanges when they are due

    @property
    def _delay(self) -> int:
        """Steps between a push and the merge of its reply; 0: as soon as it is there."""
        return self._rule.delay(self._config) if self._overlap else 0

    @property
    def _done(self) -> int:
        """Optimizer steps that were pushed, or are in flight."""
        return self.steps - self._progress.steps

    def _exchange(self) -> None:
        """It is time to push; without overlap, wait for the reply."""
        if self._in_flight is not None:
            self._wait_until_settled()
        if self.finished or self._away or self._reanchoring or self._in_flight is not None:
            return
        self._push()
        if not self._overlap:
            self._wait_until_settled()

    def _obey(self) -> None:
        """Carry out orders until one lets this worker train on; while the server is away, train on without."""

        def may_train() -> bool:
            return self._order is not None and self.steps < self._order.until

        def told() -> bool:
            return self._order is not None and (self._order.upload or bool(self._order.pull) or may_train())

        while not (self.finished or self._away or self._left):
            self._wait(lambda: told() or self.finished or self._away, None, "the next order")
            order = self._order
            if order is None or self.finished or self._away:
                return
            if order.upload:
                self._wait(lambda: not self._reanchoring or self._away or self.finished, None, "the center")
                if self._reanchoring or self.finished:
                    return
                self._push()
                self._wait_until_settled()
            for source in order.pull:
                self._pull(source)
            if order.upload or order.pull:
                if self._order is order:
                    self._order = replace(order, upload=False, pull=())
                self._driver.post(core.Progress(self.steps, self._samples, self._loss, obeyed=True))
            if may_train():
                return

    def _pull(self, source: str) -> None:
        """x <- what the rule makes of `source`, such as a leader."""
        assert self._rule.pull is not None
        self._pulled = None
        self._driver.post(PullWanted("order", source))
        self._wait(lambda: self._pulled is not None or self._away or self.finished, None, f"'{source}'")
        if (pulled := self._take_pulled()) is None:
            return
        n = self._parameters
        self._binding.gather(self._x)
        self._rule.pull(self._config, self._x[:n], source, pulled.values[:n])
        self._binding.scatter(self._x)
        self.exchanges.bytes_down += self._core.plan(str(self.settings["reply_codec"])).bytes
        self._base = pulled.base

    def _take_pulled(self) -> core.Fetched | None:
        pulled, self._pulled = self._pulled, None
        return pulled

    def global_model(self, timeout_s: float = 60.0) -> torch.nn.Module:
        """A copy of the model that holds the center as it is now on the server; for evaluation.

        Raises NetworkError where the server does not answer within `timeout_s`.
        """
        self._evaluated = None
        self._driver.post(PullWanted("evaluate"))
        self._wait(lambda: self._evaluated is not None, timeout_s, "the center")
        fetched = self._take_evaluated()
        if fetched is None:
            raise NetworkError(f"{self._address} did not send the center within {timeout_s:g} s.", fix="Is it running?")
        found = copy.deepcopy(self._model)
        Binding(found, self._layout).scatter(fetched.values)
        return found

    def _take_evaluated(self) -> core.Fetched | None:
        fetched, self._evaluated = self._evaluated, None
        return fetched

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Push what is not pushed yet and wait until it is settled; False where that did not succeed in time."""
        deadline = self._now() + timeout_s
        if self._rule.schedules:  # this worker's parameters are its own, and pushed only when they are asked for
            return True
        while not self.finished and (self._in_flight is not None or self._progress.steps):
            self._take_news()
            if self._early is not None:
                self._wait_until_settled()
            if self._in_flight is None and self._progress.steps and not self._away and not self._reanchoring:
                self._push()
            left = deadline - self._now()
            if left <= 0:
                return False
            self._take(self._driver.news(min(left, 0.1)))
        return True

    def close(self, reason: str = "finished its work") -> None:
        """Say Bye and end the connection. A second call does nothing."""
        if not self._left:
            self._part(reason, timeout_s=2.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._left:
            return
        if kind is None:
            self.flush()
            self.close()
        else:
            self.close(f"stopped by {kind.__name__}")

    # Joining

    def _join(self, connect_timeout_s: float) -> None:
        started, told = self._now(), False
        while self._reanchoring or self._base == NOWHERE or (self._rule.schedules and self._order is None):
            news = self._driver.news(0.5)
            self._take(news)
            waited = self._now() - started
            if self._core.membership.token == "":
                if waited > connect_timeout_s:
                    raise NetworkError(
                        f"Nothing answers at {self._address} after {connect_timeout_s:g} s.",
                        fix="Is the server running there? `paramserver serve` prints the line to join it.",
                    )
                if waited > 2.0 and not told:
                    told = True
                    log.warning("waiting for a server at %s", self._address)
            elif waited > PATIENCE_S and not told:
                told = True
                log.warning("waiting for the initial weights of another worker")
            if self.finished and self._core.phase == "ended":
                return

    def _adopt(self, joined: core.Joined) -> None:
        settings = joined.welcome.settings
        self._rule = rules.load(str(settings["rule"]))
        self._config = rules.configure(self._rule, joined.welcome.rule_settings)
        self._local_steps = int(settings["local_steps"])
        self._meter.every_steps = int(settings["diversity_every_steps"])
        self._overlap = bool(settings["overlap"])
        self._average_buffers = settings["buffers"] == "average"
        fragments = self._rule.fragments(self._config)
        cuts = [(part, fragments) for part in range(fragments)]
        choices = codecs.choices(str(settings["codec"]))
        self._choice = Choice(choices)
        rows = codecs.at_rows(str(settings["codec"]), str(settings["reply_codec"]))
        self._ups = [{codec: plan(self._layout, codec, *cut, rows=rows) for codec in choices} for cut in cuts]
        self._downs: list[Plan] = [plan(self._layout, str(settings["reply_codec"]), *cut, rows=rows) for cut in cuts]
        longest = max(up.bytes for ups in self._ups for up in ups.values())
        self._update: U8 = self._driver.staging(longest, str(settings["machine"]))
        in_place = {codec: up.in_place(self._update) if fragments == 1 else None for codec, up in self._ups[0].items()}
        self._deltas = {codec: self._scratch if delta is None else delta for codec, delta in in_place.items()}
        remembers = any(up.remembers for up in self._ups[0].values())
        self._memory = Memory(self._layout.elements) if remembers else None
        self._seed = int(settings.get("seed", 0))
        self._sent = zeros(self._layout.elements if self._rule.track is not None else 0, np.float32)
        self._fragment = 0
        log.info("joined as %s: rule %s, %s local steps", joined.welcome.worker, settings["rule"], self._local_steps)

    # Exchanges

    def _push(self) -> None:
        """Encode what the rule makes of x and anchor (and the float buffers as they are) and send it off."""
        n, up = self._parameters, self._ups[self._fragment][self._choice.codec]
        self._binding.gather(self._x)
        x, delta = self._x, self._deltas[up.codec]
        if self._rule.point is not None:
            x = self._spare
            x[:] = self._x
            self._binding.gather_state(self._optimizer, "momentum_buffer", delta)
            self._rule.point(self._config, x[:n], delta[:n], _rule_facts(self._optimizer))
        self._rule.update(self._config, x[:n], self._anchor[:n], delta[:n])
        delta[n:] = self._x[n:]
        progress, self._progress = self._progress, Progress()
        part = up.part
        if self._memory is not None:
            self._memory.add(delta, part.start, part.stop)
        self._in_flight = _InFlight(self._x, progress, part, self.steps, self._now())
        self._x, self._spare = self._spare, self._x
        mean_loss = progress.loss_sum / max(progress.steps, 1)
        lr = float(self._optimizer.param_groups[0]["lr"])
        scalars = Scalars(mean_loss, progress.samples, progress.steps, lr, self._meter.take())
        outlived, self._outlived = self._outlived, None
        self._encoded += 1
        key = draws.of_push(self._seed, self.name, self._encoded)
        data = self._update[: up.bytes]
        before = self._memory.before if self._memory is not None else None
        try:
            self._driver.push(delta, up, data, scalars, self._base, outlived, self._fragment, key=key, before=before)
        except CodecError as error:
            self._in_flight, self._progress = None, progress
            self._reject(str(error))
            return
        self.exchanges.bytes_up += up.bytes
        if self._memory is not None:
            self._memory.remember(delta, up.pieces(data))
        if self._rule.track is not None:
            up.decode(self._update, self._sent)

    def _settled(self, news: core.Settled, *, early: bool) -> None:
        if self._in_flight is None:
            return  # withdrawn meanwhile
        self._settle_memory(taken=news.outcome == "applied")
        if early and news.answered_s is not None and news.outcome == "applied":
            self._weigh(news.answered_s - self._in_flight.since, shared=news.shared)
        if early and news.values is not None and self.steps - self._in_flight.at_step < self._delay:
            self._early = news
            return
        if news.outcome == "applied" and news.values is not None:
            self.exchanges.pushed += 1
            self._rejected_in_a_row = 0
            self.exchanges.bytes_down += self._downs[self._fragment].bytes
            self._local_steps = news.local_steps
            self._merge(news.values, self._in_flight.x, self._in_flight.part)
            self._base = news.base
            self._in_flight = None
            self._fragment = (self._fragment + 1) % len(self._ups)
        elif news.code == Code.FINISHED or news.outcome == "applied":
            self.exchanges.pushed += news.outcome == "applied"
            self._in_flight = None
        else:
            self._count_rejected(news.sentence, news.code)
            log.warning(
                "update %d was refused (%s): %s It is dropped; going on from the center.",
                news.number,
                news.code,
                news.sentence,
            )
            self._reanchoring = True  # in flight stays: what was refused is not pushed again
            self._driver.post(PullWanted("anchor"))

    def _weigh(self, seconds: float, *, shared: bool) -> None:
        """An exchange took so long: where the codec is still open, that counts."""
        if self._choice.open:
            self._choice.took(seconds, shared=shared)
            self.exchanges.choice = self._choice.reason
            if self._choice.reason:
                log.info("codec auto chooses %s", self._choice.reason)

    def _settle_memory(self, *, taken: bool) -> None:
        if self._memory is not None:
            self._memory.settle(taken=taken)

    def _reject(self, why: str) -> None:
        """This worker's own parameters cannot be pushed: give them up, go on from the center."""
        log.warning("%s The progress of %d steps is dropped; going on from the center.", why, self._progress.steps)
        self._progress = Progress()
        self._discard = self._reanchoring = True
        self._driver.post(PullWanted("anchor"))
        self._count_rejected(why)
        if not self._away:
            self._wait(lambda: not self._reanchoring or self._away or self.finished, None, "the center")

    def _count_rejected(self, why: str, code: str = Code.NON_FINITE) -> None:
        self.exchanges.rejected += 1
        self._rejected_in_a_row += 1
        if self._rejected_in_a_row >= REJECTED_IN_A_ROW:
            raise UsageError(
                f"{self._rejected_in_a_row} updates in a row could not be pushed, the last because: {why}",
                fix="Look for NaN in loss or gradients: a lower learning rate, or a gradient scaler, may help."
                if code == Code.NON_FINITE
                else "Change what it was refused for, on the server or here.",
            )

    def _merge(self, reply: F32, start: F32, part: slice) -> None:
        """x <- merge(reply) + (x now - start), on `part` of the parameters; the anchor becomes what the rule says.

        start: (elements,) x when it was pushed; not kept.
        """
        n, sent, rule = self._parameters, self._sent, self._rule
        moved = self._progress.steps > 0
        now, merged = (self._x, self._scratch) if moved else (start, start)  # x is where it was: merge in place
        if moved:
            self._binding.gather(now)
            if part == slice(0, n):
                merged[n:] = now[n:]
            else:
                merged[:] = now
            merged[part] = start[part]
        rule.merge(self._config, merged[part], reply[part])
        if moved:
            now[part] -= start[part]
            merged[part] += now[part]
        if part.stop == n and self._average_buffers:
            merged[n:] = reply[n:]
        if rule.track is not None:
            rule.track(self._config, self._anchor[part], sent[part], reply[part])
            self._outlived = reply
        elif part == slice(0, n):
            self._anchor, self._outlived = reply, self._anchor
        else:
            self._anchor[part] = reply[part]
            self._outlived = reply
        self._binding.scatter(merged)
        if not self._binding.exact and rule.track is None:
            self._anchor_as_held(now, moved, part)

    def _anchor_as_held(self, progress: F32, moved: bool, part: slice) -> None:
        """Half precision rounds what a merge writes; that is no training, so it goes into the anchor."""
        self._binding.gather(self._scratch)
        self._anchor[part] = self._scratch[part]
        if moved:
            self._anchor[part] -= progress[part]

    def _reanchored(self, news: core.Fetched) -> None:
        """Go on from this center: x <- c + (x - what was pushed or dropped), anchor <- c.

        Under a rule whose workers keep parameters of their own, x stays; only the anchor is new.
        """
        keep = self._rule.private and self._base != NOWHERE and not self._discard
        if keep:
            self._anchor, self._outlived = news.values, self._anchor
        else:
            self._go_on_from(news.values)
        self._settle_memory(taken=False)
        self._in_flight = self._early = None
        self._base = news.base
        self._discard = self._reanchoring = False

    def _go_on_from(self, center: F32) -> None:
        if self._base == NOWHERE or self._discard:
            self._progress = Progress()
            self._binding.gather(self._x)
            start = self._x
        elif self._in_flight is not None and self._reanchoring:
            start = self._in_flight.x
        else:
            # the session was lost unnoticed; a push that crossed this news is orphaned, and is taken back here
            if self._in_flight is not None:
                self._progress.add(self._in_flight.progress)
            start = self._anchor
        n, now, merged = self._parameters, self._x, self._scratch
        moved = self._progress.steps > 0
        if moved:
            self._binding.gather(now)
        else:
            now[:] = start
        merged[:n] = center[:n]
        if moved:
            now[:n] -= start[:n]
            merged[:n] += now[:n]
        merged[n:] = center[n:] if self._average_buffers else now[n:]
        self._anchor, self._outlived = center, self._anchor
        self._binding.scatter(merged)
        if not self._binding.exact:
            self._anchor_as_held(now, moved, slice(0, n))

    def _orphaned(self, news: core.Orphaned) -> None:
        """The session was lost under a push: take it back only where it was surely not applied."""
        if self._in_flight is None:
            return  # taken back already
        self._reanchoring = True
        self._settle_memory(taken=news.pushed)
        if news.pushed:
            log.warning("the session was lost; update %d counts as pushed and is not repeated", news.number)
            return
        self._progress.add(self._in_flight.progress)
        self._in_flight = None

    # News

    def _take_news(self) -> None:
        while (news := self._driver.news()) is not None:
            self._take(news)

    def _take(self, news: Any) -> None:
        match news:
            case None:
                pass
            case core.Joined():
                self._adopt(news)
            case core.NeedWeights():
                self._send_weights()
            case core.Settled():
                self._settled(news, early=True)
            case core.Orphaned():
                self._orphaned(news)
            case core.Fetched(purpose="anchor"):
                self._reanchored(news)
            case core.Fetched(purpose="order"):
                self._pulled = news
            case core.Ordered(order):
                self._order = order
            case core.Fetched():
                self._evaluated = news
            case core.Away(sentence):
                self._away = True
                self.exchanges.away += 1
                log.warning("%s; training goes on", sentence)
            case core.Undone(first, last):
                self.exchanges.undone += last - first + 1
            case core.Back():
                self._away = False
                log.warning("the server answers again")
            case core.Finished():
                self.finished = True
            case core.Left():
                self._left = True
            case core.Failed(error):
                self._left = True
                raise Refused(error.code, error.sentence, fix=error.fix)

    def _send_weights(self) -> None:
        """Supply the first center; raises UsageError where the model is not finite."""
        exact = self._core.plan(core.LOSSLESS)
        data = np.zeros(exact.bytes, np.uint8)
        self._binding.gather(self._x)
        try:
            exact.encode(self._x, data)
        except CodecError:
            raise UsageError("The model holds NaN or infinity.", fix="Initialise it before joining.") from None
        # from here on this is the anchor: a server that lost its state starts from these weights, not from older ones
        self._anchor[:] = self._x
        self._in_flight = None
        self._progress = Progress()
        self._driver.post(core.InitialWeights(data))

    def _wait_until_settled(self) -> None:
        """Wait for the push in flight, unless the server is away: then training goes on."""
        self._take_news()
        early, self._early = self._early, None
        if early is not None:
            self._settled(early, early=False)
        if self._in_flight is None:
            self.exchanges.hidden += self._overlap
            return
        started = self._now()
        self._wait(lambda: self._in_flight is None or self._away or self.finished, None, "the exchange")
        self.exchanges.stalled_s += self._now() - started

    def _wait(self, done: Any, timeout_s: float | None, what: str) -> None:
        started, told = self._now(), False
        while not done():
            waited = self._now() - started
            if timeout_s is not None and waited >= timeout_s:
                return
            if waited > PATIENCE_S and not told:
                told = True
                log.warning("still waiting for %s from %s", what, self._address)
            self._take(self._driver.news(min(1.0, math.inf if timeout_s is None else timeout_s - waited)))
            if self._left:
                return

    def _part(self, reason: str, *, timeout_s: float) -> None:
        self._driver.post(core.Leave(reason))
        deadline = self._now() + timeout_s
        while not self._left and (left := deadline - self._now()) > 0:
            news = self._driver.news(left)
            if isinstance(news, core.Left):
                break
        self._left = True
        self._driver.close(timeout_s)


def _facts(optimizer: torch.optim.Optimizer) -> Optimizer:
    return Optimizer(*_rule_facts(optimizer))


def _rule_facts(optimizer: torch.optim.Optimizer) -> OptimizerFacts:
    group = optimizer.param_groups[0]
    return OptimizerFacts(
        type(optimizer).__name__,
        float(group["lr"]),
        float(group.get("momentum", 0.0) or 0.0),
        len(optimizer.param_groups),
        bool(group.get("nesterov", False)),
        float(group.get("dampening", 0.0) or 0.0),
    )
