"""Engine <-> asyncio: one API call is a `Call` of several choices, fed by the engine's thread, read by one task."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

from moebius.engine.client import EngineClient, StepOutput
from moebius.errors import DeadlineError, EngineError, MoebiusError
from moebius.outputs import Delta, SequenceAssembler
from moebius.schedule.request import Request, SamplingParams, choice_seed
from moebius.server.faults import DrainingError
from moebius.server.metrics import ServerMetrics
from moebius.server.settings import ServerSettings
from moebius.text import Tokenizer

log = logging.getLogger(__name__)

# The engine ends a late request itself; this long after the deadline the front door stops waiting for it to.
_GRACE_SECONDS = 30.0


class ClientGone(Exception):
    """The client has left, or was cut off: there is nobody to answer."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What one API call wants: `params.n` choices for each prompt.

    continues   the text continues the prompt's (completions), rather than standing alone (chat)
    """

    prompts: Sequence[Sequence[int]]
    params: SamplingParams
    priority: int = 0
    salt: bytes = b""
    continues: bool = False


class Choice:
    """One choice of one prompt on its way: the engine's request, the text so far, and when its tokens came."""

    __slots__ = ("assembler", "closed", "first_time", "index", "last_time", "prompt_index", "request")

    def __init__(self, index: int, prompt_index: int, request: Request, assembler: SequenceAssembler) -> None:
        self.index = index
        self.prompt_index = prompt_index
        self.request = request
        self.assembler = assembler
        self.first_time: float | None = None
        self.last_time: float | None = None
        self.closed = False


Batch = list[tuple[Choice, Delta]]


def _weight(output: StepOutput) -> int:
    """About how many bytes of JSON an output becomes."""
    entries = (*output.logprobs, *output.prompt_logprobs)
    return 300 * (1 + len(output.token_ids)) + sum(100 * (1 + len(entry.top)) for entry in entries)


class Call:
    """One API call. `async with` submits its choices, and on the way out aborts those that are not finished."""

    def __init__(self, door: FrontDoor, id: str, ask: Ask, choices: list[Choice]) -> None:
        self.id = id
        self.ask = ask
        self.choices = choices
        self.sending = False
        self.on_cut: Callable[[], None] = lambda: None
        self._door = door
        self._by_request = {choice.request.id: choice for choice in choices}
        self._inbox: list[StepOutput] = []
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._failed = False
        self._ended: MoebiusError | ClientGone | None = None
        self._open = len(choices)

    @property
    def finished(self) -> bool:
        return self._open == 0

    @property
    def keep_alive(self) -> float:
        """Seconds of silence that a client is spared."""
        return self._door.settings.keep_alive

    @property
    def prompt_tokens(self) -> int:
        return sum(len(ids) for ids in self.ask.prompts)

    @property
    def completion_tokens(self) -> int:
        return sum(choice.assembler.num_tokens for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Of the first choice of each prompt: the later ones find what the first has computed."""
        return sum(choice.assembler.num_cached_tokens for choice in self.choices[:: self.ask.params.n])

    async def __aenter__(self) -> Call:
        self._door.admit(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for choice in self.choices:
            if not choice.closed:
                self._door.client.abort(choice.request.id)
                self._close(choice, "error" if self._failed else "abort")
        self._door.forget(self)

    async def next(self) -> Batch:
        """What came since the last time, in the order it came; an empty list after `keep_alive` seconds of silence.

        Raises the error that ended a choice, DeadlineError, or ClientGone.
        """
        try:
            return await self._next()
        except (ClientGone, asyncio.CancelledError):
            raise
        except BaseException:
            self._failed = True
            raise

    async def _next(self) -> Batch:
        if not self._inbox and self._ended is None:
            self._wake.clear()
            try:
                async with asyncio.timeout(self._patience()):
                    await self._wake.wait()
            except TimeoutError:
                self._check_deadline()
        if self._ended is not None:
            raise self._ended
        outputs, self._inbox, self._waiting_bytes = self._inbox, [], 0
        batch: Batch = []
        for output in outputs:
            choice = self._by_request[output.request_id]
            if not choice.closed:
                batch.append((choice, self._take(choice, output)))
        return batch

    def failed(self, reason: str) -> None:
        """Count an error that the client hears inside its stream."""
        self._door.metrics.rejected(reason)

    def receive(self, output: StepOutput, now: float) -> None:
        """Called on the loop, for each of a step's outputs. Never blocks, never raises."""
        if self._ended is not None:
            return
        choice = self._by_request[output.request_id]
        if output.token_ids and not choice.closed:
            self._door.metrics.tokens(len(output.token_ids), now, choice.request.arrival, choice.last_time)
            choice.first_time = now if choice.first_time is None else choice.first_time
            choice.last_time = now
        self._inbox.append(output)
        self._waiting_bytes += _weight(output)
        self._wake.set()
        if self.sending and self._waiting_bytes > self._door.settings.stream_buffer_bytes:
            log.warning("%s: the reader lags by %d bytes and is cut off", self.id, self._waiting_bytes)
            self.end(ClientGone())
            self.on_cut()

    def end(self, why: MoebiusError | ClientGone) -> None:
        """End the call from outside: aborts at once, and `next` raises `why`."""
        if self._ended is not None:
            return
        self._ended = why
        self._inbox, self._waiting_bytes = [], 0
        for choice in self.choices:
            if not choice.closed:
                self._door.client.abort(choice.request.id)
        self._wake.set()

    def _take(self, choice: Choice, output: StepOutput) -> Delta:
        delta = choice.assembler.push(output)
        if choice.assembler.wants_abort:
            self._door.client.abort(choice.request.id)
        if delta.finish_reason is not None:
            self._close(choice, delta.finish_reason)
        return delta

    def _close(self, choice: Choice, reason: str) -> None:
        choice.closed = True
        self._open -= 1
        self._door.metrics.sequence_finished(
            reason,
            prompt_tokens=len(choice.request.prompt_ids),
            output_tokens=choice.assembler.num_tokens,
            arrival=choice.request.arrival,
            first=choice.first_time,
            last=choice.last_time,
            now=self._door.clock(),
        )

    @property
    def _deadline(self) -> float:
        return (self.choices[0].request.deadline or self._door.clock()) + _GRACE_SECONDS

    def _patience(self) -> float:
        return max(0.0, min(self.keep_alive, self._deadline - self._door.clock()))

    def _check_deadline(self) -> None:
        if self._door.clock() >= self._deadline:
            raise DeadlineError("the engine has not answered within the request's deadline")


class FrontDoor:
    """All calls of a server, and the way between them and the engine's thread."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        metrics: ServerMetrics,
        settings: ServerSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.settings = settings
        self.clock = clock
        self.draining = False
        self._calls: dict[str, Call] = {}
        self._by_request: dict[str, Call] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def in_flight(self) -> int:
        """API calls whose answer is not complete."""
        return len(self._calls)

    @property
    def ready(self) -> bool:
        """Whether new work would be taken and tokens flow."""
        return self._loop is not None and not self.draining and self.client.stats().ready

    def start(self) -> None:
        """Start the engine; its outputs arrive on the running loop."""
        self._loop = asyncio.get_running_loop()
        self.client.start(self._deliver)

    def open(self, id: str, ask: Ask) -> Call:
        """Check everything about a call, submit nothing. Raises RequestError, or DrainingError.

        A seed that is given serves every prompt alike, so that an answer does not depend on the prompt's place in
        the call; where none is given each prompt draws its own.
        """
        if self.draining:
            raise DrainingError
        info, now = self.client.info, self.clock()
        choices: list[Choice] = []
        for p, prompt_ids in enumerate(ask.prompts):
            seed = secrets.randbits(64) if ask.params.seed is None else ask.params.seed
            for i in range(ask.params.n):
                index = len(choices)
                request = Request.create(
                    f"{id}-{index:04d}",
                    prompt_ids,
                    ask.params,
                    info.limits,
                    arrival=now,
                    eos_ids=info.eos_ids,
                    seed=choice_seed(seed, i),
                    priority=ask.priority,
                    deadline=now + self.settings.request_timeout,
                    salt=ask.salt,
                )
                context = request.prompt_ids if ask.continues else ()
                assembler = SequenceAssembler(self.tokenizer, ask.params, prompt_ids=context)
                choices.append(Choice(index, p, request, assembler))
        return Call(self, id, ask, choices)

    def admit(self, call: Call) -> None:
        """Submit a call's choices, all or none."""
        if self.draining:
            raise DrainingError
        if self._loop is None:
            raise EngineError("the engine has not been started")
        self._calls[call.id] = call
        self._idle.clear()
        for choice in call.choices:
            self._by_request[choice.request.id] = call
        try:
            for choice in call.choices:
                self.client.submit(choice.request)
        except BaseException:
            for choice in call.choices:
                self.client.abort(choice.request.id)
            self.forget(call)
            raise

    def forget(self, call: Call) -> None:
        """Drop a call: whatever the engine still says about it is not heard."""
        self._calls.pop(call.id, None)
        for choice in call.choices:
            self._by_request.pop(choice.request.id, None)
        if not self._calls:
            self._idle.set()

    def drain(self) -> None:
        """Not ready, no new work; what is in flight goes on."""
        self.draining = True

    async def idle(self, timeout: float) -> bool:
        """Wait until nothing is in flight; False when `timeout` seconds did not suffice."""
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abort_all(self) -> None:
        """End every call in flight with DrainingError."""
        for call in list(self._calls.values()):
            call.end(DrainingError())

    def close(self, timeout: float) -> None:
        """End what is in flight and stop the engine within `timeout` seconds."""
        self.drain()
        self.abort_all()
        self.client.close(timeout)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        """On the engine's thread, once a step: one hop to the loop for all of a step's outputs."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._route, outputs, self.clock())
        except RuntimeError:
            log.info("the event loop is closed; %d outputs have no reader", len(outputs))

    def _route(self, outputs: list[StepOutput], now: float) -> None:
        for output in outputs:
            call = self._by_request.get(output.request_id)
            if call is not None:
                call.receive(output, now)
