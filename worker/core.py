"""The worker's core: what the trainer wants and what the server says, in; messages and news, out. Pure.

    greeting -> (initialising | waiting) -> joined <-> away -> ended

Laws
* Every push is settled exactly once, with what became of it; until then its bytes are kept and sent again.
* Doubt (silence, a lost link, STALE) ends the connection, never the session: dial afresh, say Hello, resume.
* When a session is gone the worker re-anchors; whether its outstanding push counts as pushed is decided here and only
  here: it is taken back only if the server shows that its number was never applied.
* Where replies are differences, the replica is what this worker was last given of the center. It moves with an anchor,
  and with a reply once all of it is here; the next push names which. The server's has the same bits.
* While the server is away, training goes on; nothing here ever stops it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import numpy as np

from common import chunks, codecs, wire
from common.buffers import zeros
from common.chunks import Plan
from common.codecs.base import F32, U8
from common.errors import Code, CodecError, ConfigError, PeerError, Refused, WireError, code_of
from common.layout import Layout
from common.messages import (
    Ack,
    Beat,
    Begin,
    Buffer,
    Bye,
    Chunk,
    Commit,
    Fault,
    Grant,
    Hello,
    Message,
    More,
    Offer,
    Optimizer,
    Order,
    Place,
    Pull,
    Purpose,
    Push,
    Reply,
    Report,
    Scalars,
    Share,
    Shared,
    Version,
    Welcome,
)
from common.node import Received, Say, Send, Tick
from common.transports.base import SERVER
from worker.events import (
    Attach,
    Away,
    Back,
    CannotAttach,
    Deliver,
    Dialled,
    Encoded,
    Failed,
    Fetched,
    Finished,
    InitialWeights,
    Joined,
    Leave,
    Left,
    LinkLost,
    NeedWeights,
    Ordered,
    Orphaned,
    Progress,
    PullWanted,
    PushWanted,
    Redial,
    Settled,
    Staged,
    Undone,
    Withdrawn,
)
from worker.session import Download, Membership, Upload

HELLO_TIMEOUTS_S = (0.5, 1.0, 2.0, 4.0, 5.0)
"""How long to wait for Welcome before dialling again; the last one repeats."""
PAUSE_S = 1.0
"""Before dialling again after a refusal that may come again."""
LEAVE_TIMEOUT_S = 1.0
SILENCE_S = 15.0
"""Before the server has said how long a lease is."""
BEAT_S = 2.0
"""At least this often a worker says that it is there."""
LOST_ON_THE_WAY = frozenset((Code.BAD_CHUNK, Code.TRUNCATED))
"""Nothing is wrong with what was sent: send it again."""
ADOPTED = ("rule", "codec", "fragments")
"""Settings that updates are made by, adopted for good when a worker joins."""
LOSSLESS = "fp32"
NO_SCALARS = Scalars(0.0, 0, 0, 0.0)


class WorkerCore:
    """One worker (or observer) of one server."""

    def __init__(
        self,
        *,
        name: str,
        instance: str,
        library: str,
        layout: Layout | None,
        optimizer: Optimizer | None,
        role: Literal["worker", "observer"] = "worker",
        host: str = "",
        group: int | None = None,
    ) -> None:
        self.role = role
        self.phase = "greeting"
        self.finished = False
        self.membership = Membership(worker=name)
        self._name = name
        self._instance = instance
        self._library = library
        self._layout = layout
        self._optimizer = optimizer
        self._host = host
        self._group = group
        self._longest_payload = max(wire.PAYLOAD_BYTES, 8 * layout.elements if layout else 0)
        """In shared memory a reply comes whole."""
        self._plans: dict[tuple[str, int | None], Plan] = {}
        self._upload: Upload | None = None
        self._place: Place | None = None
        """Where the bytes of every push lie, to be offered on each connection; None: nowhere that can be shared."""
        self._shares = False
        """Whether the server reads them there, on this connection."""
        self._spare: F32 | None = None
        """Memory for the next reply: fresh memory would cost more than filling it."""
        self._replica: F32 | None = None
        """(parameters,) float32: where replies are differences, what they are added to."""
        self._downloads: dict[int, Download] = {}
        self._wanted: dict[Purpose, str] = {}
        """Pulls not answered yet, and their sources."""
        self._progress = Progress(0)
        self._order = 0
        """The last order that was delivered."""
        self._obeyed = 0
        """The last order that was carried out."""
        self._unseen_anchor: Version | None = None
        """Version of an anchor that was delivered; until a push starts from it, the trainer may not have seen it."""
        self._attempts = 0
        self._local_steps = 1
        """H as the last Ack said it."""
        self._silence_s = SILENCE_S
        """So much silence is doubt: half a lease, so that there is time to come back within it."""
        self._beat_s = BEAT_S
        self._away_told = False
        self._last_heard = 0.0
        self._last_answer = 0.0
        """When something that was asked for last came nearer (or was asked for)."""
        self._beat_due = 0.0
        self._hello_deadline = 0.0
        self._leave_deadline = 0.0
        self._due = 0.0
        """When a Tick was wanted, as it was told last."""
        self._out: list[Any] = []
        self._now = 0.0

    def __repr__(self) -> str:
        return f"<WorkerCore {self.phase}, {self.membership!r}>"

    # The door

    def handle(self, event: Any, now: float) -> list[Any]:
        """Take in one event at `now` (monotonic seconds); return what shall be done."""
        self._now = now
        if self.phase != "ended":
            match event:
                case Received(_, frames):
                    self._received(frames)
                case Dialled():
                    self._hello()
                case LinkLost():
                    if self.phase != "greeting":
                        self._doubt("the link to the server broke")
                case InitialWeights(data):
                    self._send_initial(data)
                case PushWanted():
                    self._push(event)
                case Encoded(ready):
                    self._encoded(ready)
                case Withdrawn():
                    self._upload = None
                case PullWanted(purpose, source):
                    self._want(purpose, source)
                case Progress():
                    self._report(event)
                case Staged(place):
                    self._place = place
                    if self.phase not in ("greeting", "leaving"):
                        self._share()
                case CannotAttach(sentence):
                    self._place, self._shares = None, False
                    self._doubt(f"memory of the server cannot be shared: {sentence}")
                case Leave(reason):
                    self._leave(reason)
            if now >= self._due or isinstance(event, Tick):
                self._tick()
        out, self._out = self._out, []
        return out

    def deadline(self) -> float | None:
        """When the next Tick is wanted."""
        match self.phase:
            case "ended":
                return None
            case "greeting":
                self._due = self._hello_deadline
            case "leaving":
                self._due = self._leave_deadline
            case _:
                heard = min(self._last_heard, self._last_answer) if self._expecting else self._last_heard
                self._due = min(self._beat_due, heard + self._silence_s)
        return self._due

    def validate(self) -> None:
        """Check the invariants."""
        assert self._upload is None or self._upload.number <= self.membership.last_number, self
        assert all(0 in download.received for download in self._downloads.values()), self

    @property
    def _expecting(self) -> bool:
        """Whether anything was asked for that has not come."""
        return self.phase == "waiting" or self._upload is not None or bool(self._wanted) or bool(self._downloads)

    def plan(self, codec: str, fragment: int | None = None) -> Plan:
        """The plan of this model, or of one of its fragments, in a codec."""
        assert self._layout is not None
        if (codec, fragment) not in self._plans:
            cut = (0, 1) if fragment is None else (fragment, self.fragments)
            self._plans[codec, fragment] = chunks.plan(self._layout, codec, *cut, rows=self._at_rows)
        return self._plans[codec, fragment]

    @property
    def _at_rows(self) -> bool:
        """Whether plans are cut at the rows of matrices."""
        welcome = self.membership.welcome
        return welcome is not None and _at_rows(welcome)

    @property
    def fragments(self) -> int:
        """Parts the vector is cut into by the server's rule."""
        welcome = self.membership.welcome
        return int(welcome.settings["fragments"]) if welcome else 1

    @property
    def _adds_replies(self) -> bool:
        """Whether replies to pushes are differences to the replica."""
        welcome = self.membership.welcome
        return bool(welcome and welcome.settings.get("replica"))

    # Connecting

    def _hello(self) -> None:
        layout, self._shares = self._layout, False
        timeout_s = HELLO_TIMEOUTS_S[min(self._attempts, len(HELLO_TIMEOUTS_S) - 1)]
        self._attempts += 1
        self._hello_deadline = self._now + timeout_s
        self._send(
            Hello(
                library=self._library,
                instance=self._instance,
                role=self.role,
                worker=self._name,
                fingerprint=layout.fingerprint if layout else "",
                elements=layout.elements if layout else 0,
                codecs=codecs.known(),
                host=self._host,
                group=self._group,
                optimizer=self._optimizer,
                resume=self.membership.resume() if self.role == "worker" else None,
                payload=layout.describe() if layout else b"",
            )
        )

    def _doubt(self, sentence: str, *, at_once: bool = True) -> None:
        """Something is wrong with the connection: dial afresh, and resume; after a pause where haste might not help."""
        if self.phase == "leaving":
            self._end()
            return
        if not self._away_told and self.membership.token:
            self._away_told = True
            self._deliver(Away(sentence))
        self.phase = "greeting"
        self._downloads.clear()
        self._attempts = 0
        if at_once:
            self._hello_deadline = self._now + HELLO_TIMEOUTS_S[0]
            self._out.append(Redial())
        else:
            self._hello_deadline = self._now + PAUSE_S

    def _welcome(self, welcome: Welcome) -> None:
        m = self.membership
        if self.phase == "leaving":
            return
        if welcome.session == m.token and welcome.connection < m.connection:
            return  # of a connection that a later one has replaced: what it says of numbers is no longer so
        self._last_answer = self._now
        first_of_connection = (welcome.session, welcome.connection) != (m.token, m.connection)
        heard_of = m.welcome is not None and m.welcome.init in (welcome.init, "have")
        if not first_of_connection and (heard_of or self.phase == "joined"):
            return  # said before, or overtaken by newer news
        if m.welcome is not None and (changed := _changed(m.welcome, welcome)):
            before, now = (", ".join(f"{k} {w.settings[k]}" for k in changed) for w in (m.welcome, welcome))
            sentence = f"The server has come back with {now}; this worker joined it with {before}."
            self._fail(Refused(Code.UNEXPECTED, sentence, fix="Start the worker anew."))
            return
        known_before = bool(m.token)
        m.welcome, m.worker = welcome, welcome.worker
        m.known = max(m.known, welcome.version)
        lease_s = float(welcome.settings["lease_s"])
        self._silence_s, self._beat_s = lease_s / 2, min(lease_s / 6, BEAT_S)
        self._attempts = 0
        self._beat_due = self._now + self._beat_s
        if first_of_connection:
            self._adopt_session(welcome, known_before)
            if not known_before:
                self._deliver(Joined(welcome))
            if self._place is not None:
                self._share()
        if self._away_told:
            self._away_told = False
            self._deliver(Back())
        if welcome.settings.get("finished"):
            self._finish()
        match welcome.init:
            case "send":
                self.phase = "initialising"
                self._deliver(NeedWeights())
            case "wait":
                self.phase = "waiting"
                self._upload = None if self._upload and self._upload.kind == "init" else self._upload
            case "have":
                self.phase = "joined"
                self._upload = None if self._upload and self._upload.kind == "init" else self._upload
                self._go_on()

    def _adopt_session(self, welcome: Welcome, known_before: bool) -> None:
        """What the answer to Hello means for what was under way."""
        m, upload = self.membership, self._upload
        if welcome.lost:
            first, last = welcome.lost[0], welcome.lost[-1]
            self._say("warning", f"A crash of the server undid updates {first} to {last} of this worker.")
            self._deliver(Undone(first, last))
        known = welcome.session == m.token
        overtaken = upload is not None and upload.number < welcome.last_decided  # a repeat would never be answered
        if known and welcome.resumed == "live" and not overtaken:
            if upload is not None:
                upload.rewind()
        else:
            if upload is not None and upload.kind == "push":
                # a session that nobody remembers may have applied what was sent: never push it twice
                pushed = welcome.last_decided >= upload.number if known else upload.tried
                self._deliver(Orphaned(upload.number, pushed))
            self._upload = None
            m.anchored = False
        if known:
            m.last_number = max(m.last_number, welcome.last_decided)
        else:
            m.last_number = m.last_applied = 0
            self._order = self._obeyed = 0
        m.token, m.connection = welcome.session, welcome.connection
        m.last_applied = min(m.last_applied, max(welcome.last_decided, 0))

    def _go_on(self) -> None:
        """The server has weights: get an anchor where there is none, then everything that is outstanding."""
        if self.role == "worker" and not self.membership.anchored and "anchor" not in self._wanted:
            self._wanted = {"anchor": "", **self._wanted}
        for purpose, source in self._wanted.items():
            self._pull(purpose, source)
        self._say_report()
        if self._upload is not None and self.membership.anchored:
            self._start_upload(self._upload)

    def _share(self) -> None:
        """Offer the memory of all pushes to a server that could run on this machine."""
        m = self.membership
        if self._place is not None and cast(Welcome, m.welcome).settings["machine"]:
            self._send(Share(m.token, m.connection, self._place))

    # Going up

    def _send_initial(self, data: U8) -> None:
        if self.phase == "initialising":
            plan = self.plan(LOSSLESS)
            version = cast(Welcome, self.membership.welcome).version
            self._upload = Upload("init", 0, data, plan, NO_SCALARS, version, 0, len(plan.chunks))
            self._start_upload(self._upload)

    def _push(self, wanted: PushWanted) -> None:
        assert self._upload is None, "one push at a time"
        m = self.membership
        m.last_number += 1
        if wanted.spare is not None:
            self._spare = wanted.spare
        if not m.anchored or (self._unseen_anchor is not None and wanted.base < self._unseen_anchor):
            # the session was lost meanwhile: this update starts from an anchor that is no more
            self._deliver(Orphaned(m.last_number, pushed=False))
            return
        self._unseen_anchor = None
        plan = self.plan(wanted.codec, wanted.fragment)
        self._upload = Upload(
            "push", m.last_number, wanted.data, plan, wanted.scalars, wanted.base, wanted.fragment, wanted.ready
        )
        if self.phase == "joined":
            self._start_upload(self._upload)

    def _encoded(self, ready: int) -> None:
        if (upload := self._upload) is None:
            return
        upload.ready = ready
        if self.phase != "joined":
            return  # it starts afresh on the next connection
        if upload.whole:
            self._send_whole(upload)
        else:
            self._send_chunks(upload)

    def _start_upload(self, upload: Upload) -> None:
        upload.shared = self._shares
        self._last_answer = self._now
        upload.whole = len(upload.plan.chunks) == 1 or (self._shares and upload.kind == "push")
        if upload.whole:
            self._send_whole(upload)
        else:
            upload.tried = True
            self._send(self._begin(upload))

    def _begin(self, upload: Upload) -> Begin:
        m, plan = self.membership, upload.plan
        kind, number, fragment, base = upload.kind, upload.number, upload.fragment, upload.base
        return Begin(m.token, m.connection, kind, number, fragment, plan.codec, plan.bytes, base, m.merged)

    def _send_whole(self, upload: Upload) -> None:
        """In one message, as soon as all is encoded."""
        if upload.ready == len(upload.plan.chunks) and not upload.committed:
            upload.sent, upload.committed, upload.tried = upload.ready, True, True
            self._send(Push(self._begin(upload), upload.scalars, upload.data[: upload.plan.bytes].data))

    def _continue_upload(self, transfer: int, until: int) -> None:
        upload = self._upload
        if upload is None or upload.number != transfer or upload.committed:
            return
        upload.until = max(upload.until, until)
        self._send_chunks(upload)

    def _send_chunks(self, upload: Upload) -> None:
        """As many as are encoded and allowed; after the last of all, Commit."""
        m = self.membership
        while upload.sent < min(upload.until, upload.ready):
            piece = upload.plan.chunks[upload.sent]
            payload = upload.data[piece.offset : piece.offset + piece.size].data
            self._send(Chunk(m.token, m.connection, upload.number, upload.sent, payload))
            upload.sent += 1
        if upload.sent == len(upload.plan.chunks) and not upload.committed:
            upload.committed = True
            self._send(Commit(m.token, m.connection, upload.number, upload.scalars))

    # Coming down

    def _want(self, purpose: Purpose, source: str) -> None:
        if purpose not in self._wanted:
            self._wanted[purpose] = source
            if self.phase == "joined":
                self._pull(purpose, source)

    def _pull(self, purpose: Purpose, source: str) -> None:
        m = self.membership
        self._last_answer = self._now
        self._send(Pull(m.token, m.connection, purpose, source, m.known, m.merged))

    # Under a rule that schedules

    @property
    def _schedules(self) -> bool:
        welcome = self.membership.welcome
        return bool(welcome and welcome.settings["schedules"])

    def _report(self, progress: Progress) -> None:
        self._progress = progress
        if progress.obeyed:
            self._obeyed = self._order
        self._say_report()

    def _say_report(self) -> None:
        m = self.membership
        if self._schedules and self.phase == "joined" and m.anchored:
            p = self._progress
            self._send(Report(m.token, m.connection, p.steps, p.samples, p.loss, self._obeyed, p.diversity))

    def _ordered(self, order: Order) -> None:
        if order.id > self._order:
            self._order = order.id
            self._deliver(Ordered(order))

    def _ack(self, ack: Ack) -> None:
        upload, m = self._upload, self.membership
        m.known = max(m.known, ack.version)
        if ack.finished:
            self._finish()
        if upload is None or ack.number != upload.number or ack.outcome == "none":
            return
        upload.answered(self._now)
        if ack.outcome == "held":
            return
        if upload.kind == "init":
            self._upload = None
            self.phase = "joined"
            self._go_on()
            return
        if ack.outcome == "applied":
            m.last_applied = max(m.last_applied, ack.number)
        if ack.reply is None:
            self._upload = None
            how, told = (upload.answered_s, upload.shared), (ack.outcome, ack.code, ack.sentence)
            self._deliver(Settled(ack.number, *told, ack.version, ack.local_steps, None, *how))
        else:
            self._local_steps = ack.local_steps
            self._receive(ack.reply, "push", ack.number, ack.payload, fragment=upload.fragment)

    def _receive(
        self,
        reply: Reply,
        purpose: Literal["push", "anchor", "evaluate", "order"],
        number: int,
        payload: Buffer,
        *,
        source: str = "",
        fragment: int | None = None,
    ) -> None:
        try:
            plan = self.plan(reply.codec, fragment)
        except ConfigError as error:
            raise WireError(f"A reply in an unknown codec was announced: {error.sentence}") from None
        if reply.bytes != plan.bytes:
            raise WireError(f"A reply of {reply.bytes} bytes was announced, {plan.bytes} expected.")
        adds = purpose == "push" and self._adds_replies
        replica = self._replica if adds else None
        if adds and replica is None:
            raise WireError("A difference was announced before the center that it is added to.")
        values, self._spare = self._spare, None
        if values is None:
            values = zeros(plan.elements, np.float32)
        download = Download(reply, purpose, number, plan, source, values, bytearray(len(plan.chunks)), replica)
        self._downloads[reply.id] = download
        if len(payload) == plan.bytes:
            self._land(download, plan.whole, payload)
            self._arrived(download)
        elif len(plan.chunks) == 1:
            raise WireError(f"A reply of {plan.bytes} bytes came with {len(payload)}.")
        else:
            self._open(download)

    def _open(self, download: Download) -> None:
        """Keep the window of a download open."""
        window = int(cast(Welcome, self.membership.welcome).settings["window_chunks"])
        arrived = sum(download.received)
        if download.until < len(download.received) and download.until - arrived <= window // 2:
            download.until = arrived + window
            m = self.membership
            self._send(More(m.token, m.connection, download.reply.id, download.until))

    def _take(self, download: Download, index: int, payload: Buffer) -> None:
        self._decode(download, index, payload)
        if download.complete:
            self._arrived(download)
        else:
            self._open(download)

    def _decode(self, download: Download, index: int, payload: Buffer) -> None:
        """One chunk into its place, checked."""
        plan = download.plan
        if index >= len(plan.chunks) or len(payload) != plan.chunks[index].size:
            raise WireError(f"Chunk {index} of a reply does not fit.")
        self._land(download, plan.chunks[index], payload)
        download.received[index] = 1

    @staticmethod
    def _land(download: Download, chunk: chunks.Chunk, payload: Buffer) -> None:
        """Into its place, checked; where it is a difference, what that makes of the replica."""
        plan = download.plan
        plan.open(chunk, np.frombuffer(payload, np.uint8), download.values)
        if download.replica is not None:
            for block in plan.blocks[chunk.first : min(chunk.last, plan.parameter_blocks)]:
                download.values[block.first : block.last] += download.replica[block.first : block.last]

    def _arrived(self, download: Download) -> None:
        """All of it is here."""
        del self._downloads[download.reply.id]
        m, version = self.membership, download.reply.version
        m.known = max(m.known, version)
        if download.purpose == "push":
            if (upload := self._upload) is not None and upload.number == download.number:
                self._upload = None
                if download.replica is not None:
                    download.replica[download.plan.part] = download.values[download.plan.part]
                m.merged = download.reply.id
                if cast(Welcome, m.welcome).settings.get("confirm"):  # the server keeps the reply until it hears this
                    self._send(More(m.token, m.connection, download.reply.id, 0))
                how, told = (upload.answered_s, upload.shared), ("applied", "", "")
                self._deliver(Settled(download.number, *told, version, self._local_steps, download.values, *how))
            return
        if download.purpose not in self._wanted:
            return
        del self._wanted[download.purpose]
        if download.purpose == "anchor":
            m.anchored = m.trained = True
            if self._adds_replies:
                self._replica = download.values[: download.plan.part.stop].copy()
            self._unseen_anchor = version
            m.merged = download.reply.id
        self._deliver(Fetched(download.purpose, download.source, version, download.values))
        if download.purpose == "anchor":
            self._say_report()
            if self._upload is not None:
                self._start_upload(self._upload)

    # Messages

    def _received(self, frames: Sequence[Buffer]) -> None:
        try:
            message = wire.decode(frames, payload_bytes=self._longest_payload)
            self._last_heard = self._now
            self._dispatch(message)
        except (WireError, CodecError) as error:
            if error.code == Code.PROTOCOL_VERSION:
                self._fail(error)
            else:
                self._say("warning", f"The server sent something that cannot be read: {error}")
                self._doubt("the server sent something that cannot be read", at_once=False)

    def _dispatch(self, message: Message) -> None:
        m = self.membership
        if isinstance(message, Welcome):
            self._welcome(message)
            return
        if isinstance(message, Fault):
            self._fault(message)
            return
        if (getattr(message, "session", ""), getattr(message, "connection", 0)) != (m.token, m.connection):
            return  # of an old connection
        if not isinstance(message, Beat):
            self._last_answer = self._now
        match message:
            case Grant(decision="go"):
                self._continue_upload(message.number, message.until)
            case Grant(decision="refuse"):
                self._refused(message)
            case More():
                self._continue_upload(message.transfer, message.until)
            case Ack():
                self._ack(message)
            case Offer():
                if message.finished:
                    self._finish()
                self._receive(message.reply, message.purpose, 0, message.payload, source=message.source)
            case Order():
                self._ordered(message)
            case Shared(place=Place() as place):
                self._shares = True
                self._out.append(Attach(place))
            case Shared():
                self._say("info", f"No memory is shared with the server: {message.sentence}")
            case Chunk():
                if download := self._downloads.get(message.transfer):
                    self._take(download, message.index, message.payload)
            case Bye(reason="finished"):
                self._finish()
            case Bye(reason="draining"):
                self._say("info", "The server is stopping; training goes on until it is back.")
                if not self._away_told:
                    self._away_told = True
                    self._deliver(Away("the server is stopping"))
            case Bye():
                self._end()
            case _:
                pass  # Beat, Grant(wait): hearing them is all

    def _refused(self, grant: Grant) -> None:
        """A push was refused before it began; its number was not decided."""
        upload = self._upload
        if upload is None or upload.number != grant.number or grant.code == Code.DRAINING:
            return
        self._upload = None
        m = self.membership
        steps = int(cast(Welcome, m.welcome).settings["local_steps"])
        self._deliver(Settled(grant.number, "rejected", grant.code, grant.sentence, m.known, steps, None))

    def _fault(self, fault: Fault) -> None:
        error = Refused(code_of(fault.code), fault.sentence, fix=fault.fix)
        if error.code == Code.STALE:
            if self.phase not in ("greeting", "leaving"):
                self._doubt("the session is no longer known to this connection")
        elif error.code == Code.DRAINING:
            pass  # the next Hello finds the server gone, or back
        elif self.phase == "initialising" and error.code in LOST_ON_THE_WAY:
            self._doubt("not all of the initial weights arrived")
        elif self.phase in ("greeting", "initialising") or error.code == Code.DIVERGED:
            self._fail(error)
        else:
            self._say("warning", f"The server refused something ({error.code}): {error}")
            self._doubt("the server refused a message", at_once=False)

    def _fail(self, error: PeerError) -> None:
        self.phase = "ended"
        self._deliver(Failed(error))

    # Liveness and ends

    def _tick(self) -> None:
        now = self._now
        match self.phase:
            case "ended":
                return
            case "greeting":
                if now >= self._hello_deadline:
                    self._hello_deadline = now + HELLO_TIMEOUTS_S[-1]
                    self._out.append(Redial())
            case "leaving":
                if now >= self._leave_deadline:
                    self._end()
            case _:
                if now - self._last_heard >= self._silence_s:
                    self._doubt(f"the server was silent for {self._silence_s:g} s")
                elif self._expecting and now - self._last_answer >= self._silence_s:
                    self._doubt(f"the server did not answer for {self._silence_s:g} s")
                elif now >= self._beat_due:
                    self._beat_due = now + self._beat_s
                    m = self.membership
                    self._send(Beat(m.token, m.connection, self._progress.steps))
                    self._say_report()  # again: it may be what the server, or its order what this worker, waits for

    def _finish(self) -> None:
        if not self.finished:
            self.finished = True
            self._deliver(Finished())

    def _leave(self, reason: str) -> None:
        m = self.membership
        if self.phase == "greeting" or not m.token:
            self._end()
            return
        self.phase = "leaving"
        self._leave_deadline = self._now + LEAVE_TIMEOUT_S
        self._send(Bye(m.token, m.connection, reason))

    def _end(self) -> None:
        self.phase = "ended"
        self._deliver(Left())

    def _send(self, message: Message) -> None:
        self._out.append(Send(SERVER, wire.encode(message)))

    def _deliver(self, news: Any) -> None:
        self._out.append(Deliver(news))

    def _say(self, level: str, sentence: str) -> None:
        self._out.append(Say(level, sentence))


def _at_rows(welcome: Welcome) -> bool:
    """Whether, with the codecs of this server, plans are cut at the rows of matrices."""
    return codecs.at_rows(str(welcome.settings["codec"]), str(welcome.settings["reply_codec"]))


def _changed(before: Welcome, now: Welcome) -> list[str]:
    """What updates are made by and is not as it was; the codec of replies only where plans are cut by it."""
    changed = [each for each in ADOPTED if before.settings[each] != now.settings[each]]
    return changed or (["reply_codec"] if _at_rows(before) != _at_rows(now) else [])
