"""Engine <-> asyncio: a call is several choices, fed by the engine's thread, read by one task."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count
from types import TracebackType
from typing import Self

from moebius.engine.client import EngineClient, StepOutput
from moebius.engine.faults import failure
from moebius.errors import (
    DeadlineError,
    EngineError,
    MoebiusError,
    OverloadError,
    RequestError,
)
from moebius.front.assemble import Delta, SequenceAssembler
from moebius.front.choices import ChoiceOpener
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.server.faults import DrainingError, Fault
from moebius.server.keys import OUTSIDER, Caller
from moebius.server.metrics import SequenceTimes, ServerMetrics
from moebius.server.settings import ServerSettings
from moebius.text import EncodedPrompt, Expected

log = logging.getLogger(__name__)


class ClientGone(Exception):
    """There is nobody to answer: the client has left, or was cut off. `how` is what the log line
    calls it."""

    def __init__(self, how: str = "client_gone") -> None:
        super().__init__(how)
        self.how = how


@dataclass(slots=True, eq=False)
class LiveChoice:
    """A choice of a call in flight: what was asked, its text so far, and when its tokens came."""

    index: int
    prompt_index: int
    request: EngineRequest
    assembler: SequenceAssembler
    times: SequenceTimes
    closed: bool = False


News = list[tuple[LiveChoice, Delta]]
"""What came for a call at one time, in the order it came."""


# Timers go off early by a part of a millisecond at the most.
_EARLY_SECONDS = 0.01
# About so many bytes of JSON are taken from an inbox between two turns of the loop.
_AT_ONCE = 2**20


def _weight(output: StepOutput) -> int:
    """About how many bytes of JSON an output becomes."""
    entries = (*output.logprobs, *output.prompt_logprobs)
    return 300 * (1 + len(output.token_ids)) + sum(100 * (1 + len(entry.top)) for entry in entries)


class Call:
    """One API call: `params.n` choices for each prompt.

    `async with` submits its choices, and on the way out aborts those that are not finished.
    keep_alive is the silence, in seconds, that its client is spared; fault is the error that it
    hears inside its stream.
    """

    def __init__(
        self,
        door: "FrontDoor",
        id: str,
        params: SamplingParams,
        choices: list[LiveChoice],
        caller: Caller = OUTSIDER,
    ) -> None:
        self.id = id
        self.params = params
        self.choices = choices
        self.keep_alive = door.settings.keep_alive
        self.sending = False
        self.received_bytes = 0
        """About how many bytes of JSON all that `next` has given so far becomes."""
        self.fault: Fault | None = None
        self.on_cut: Callable[[], None] = lambda: None
        self.as_written: Callable[[RequestError], RequestError] = lambda error: error
        """An error in the words of the protocol that the client speaks."""
        self._door = door
        self._caller = caller
        self._queued: dict[str, int] = {}
        self._inbox: list[tuple[LiveChoice, StepOutput]] = []
        self._waiting_bytes = 0
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._rouses_at = 0.0
        self._end = "refused"
        self._ended: MoebiusError | ClientGone | None = None
        # The engine ends a late request between two steps. Its client hears of it at once, however
        # long a step takes.
        self._deadline = choices[0].request.deadline or math.inf

    @property
    def finished(self) -> bool:
        return all(choice.closed for choice in self.choices)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(choice.request.prompt_ids) for choice in self.choices[:: self.params.n])

    @property
    def completion_tokens(self) -> int:
        return sum(choice.assembler.num_tokens for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        """Of the first choice of each prompt: the later ones find what the first has computed."""
        return sum(choice.assembler.num_cached_tokens for choice in self.choices[:: self.params.n])

    async def __aenter__(self) -> Self:
        self._queue()
        try:
            self._door.admit(self)
        except BaseException:
            self._leave_queue()
            raise
        return self

    def _queue(self) -> None:
        """Count its prompts among what waits of its key's. Raises Fault where that is too much."""
        tokens = {choice.request.id: choice.request.num_tokens for choice in self.choices}
        self._caller.quota.queue(sum(tokens.values()), self._caller.key.limits)
        self._queued = tokens

    def _leave_queue(self) -> None:
        self._caller.quota.leave_queue(sum(self._queued.values()))
        self._queued = {}

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            left = [choice for choice in self.choices if not choice.closed]
            self._leave_queue()
            for choice in left:
                self._door.client.abort(choice.request.id)
            self._end = self._how_it_ended(error)
            for choice in left:
                self._close(choice, "error" if self._end == "failed" else "abort")
            for first in range(0, len(self.choices), self.params.n):
                group = self.choices[first : first + self.params.n]
                drawn = max(choice.assembler.num_tokens for choice in group)
                self._door.metrics.prompt_finished(drawn)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            # A call that stayed would be waited for when the server drains.
            self._door.forget(self)

    def _how_it_ended(self, error: BaseException | None) -> str:
        if self.fault is not None:
            return "failed"
        if isinstance(error, ClientGone):
            return error.how
        if isinstance(error, Exception):
            return "failed"
        return "finished" if error is None else "cancelled"

    def facts(self) -> dict[str, object]:
        """What a log line says of the call: ids and numbers."""
        return {
            "call": self.id,
            "end": self._end,
            "choices": len(self.choices),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens,
            **self.choices[0].times.told(),
        }

    async def next(self) -> News:
        """What came since the last time, in the order it came; an empty list after `keep_alive`
        seconds of silence.

        Raises the error that ended a choice, DeadlineError, or ClientGone.
        """
        if self._inbox:  # what else the loop has to do comes in between
            await asyncio.sleep(0)
        until = min(self._deadline, self._door.clock() + self.keep_alive)
        while not self._inbox and self._ended is None and (left := until - self._door.clock()) > 0:
            self._wake.clear()
            self._wake_within(left)
            await self._wake.wait()
        if not self._inbox and self._ended is None and self._door.clock() >= self._deadline:
            raise DeadlineError("the request's deadline passed before it was finished")
        if self._ended is not None:
            raise self._ended
        return [
            (choice, self._take(choice, output))
            for choice, output in self._first_of_inbox()
            if not choice.closed
        ]

    def _wake_within(self, seconds: float) -> None:
        """By a timer that may go off sooner: whoever waits looks at the clock, and waits on. So one
        timer lasts for the tokens of many steps."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        at = now + seconds
        if self._timer is not None:
            if now + _EARLY_SECONDS < self._rouses_at <= at:
                return  # it has not gone off yet
            self._timer.cancel()
        # An event's own method, which cannot fail as a method of a request's could.
        self._timer = loop.call_at(at, self._wake.set)
        self._rouses_at = at

    def _first_of_inbox(self) -> list[tuple[LiveChoice, StepOutput]]:
        """What came first, about _AT_ONCE bytes of it: what takes longer would hold the loop."""
        weight = 0
        count = 0
        while count < len(self._inbox) and weight < _AT_ONCE:
            weight += _weight(self._inbox[count][1])
            count += 1
        outputs = self._inbox[:count]
        self._inbox = self._inbox[count:]
        self._waiting_bytes -= weight
        self.received_bytes += weight
        return outputs

    def _empty_inbox(self) -> None:
        self._inbox = []
        self._waiting_bytes = 0

    def receive(self, choice: LiveChoice, output: StepOutput, now: float) -> None:
        """Called on the loop, for each of a step's outputs. Never blocks, never raises."""
        if self._ended is not None:
            return
        if output.token_ids and not choice.closed:
            self._door.metrics.tokens(choice.times, len(output.token_ids), now)
        self._caller.quota.leave_queue(self._queued.pop(choice.request.id, 0))
        self._inbox.append((choice, output))
        weight = _weight(output)
        self._waiting_bytes += weight
        self._wake.set()
        if self.sending and self._waiting_bytes > self._door.settings.stream_buffer_bytes:
            log.warning(
                "%s: the reader lags by %d bytes and is cut off", self.id, self._waiting_bytes
            )
            self.end(ClientGone("cut_off"))
            self.on_cut()

    def end(self, why: MoebiusError | ClientGone) -> None:
        """End the call from outside: aborts at once, and `next` raises `why`."""
        if self._ended is not None:
            return
        self._ended = why
        self._empty_inbox()
        for choice in self.choices:
            if not choice.closed:
                self._door.client.abort(choice.request.id)
        self._wake.set()

    def _take(self, choice: LiveChoice, output: StepOutput) -> Delta:
        choice.times.computed(output)
        try:
            delta = choice.assembler.push(output)
        except RequestError as error:
            raise self.as_written(error) from error
        if choice.assembler.wants_abort:
            self._door.client.abort(choice.request.id)
        if delta.finish_reason is not None:
            self._close(choice, delta.finish_reason)
        return delta

    def _close(self, choice: LiveChoice, reason: str) -> None:
        choice.closed = True
        read = choice.assembler
        self._door.metrics.tool_calls(read.num_calls, read.malformed_calls)
        self._door.metrics.sequence_finished(
            reason,
            choice.times,
            self._door.clock(),
            prompt_tokens=len(choice.request.prompt_ids),
            output_tokens=choice.assembler.num_tokens,
        )


Refusal = Callable[[str], OverloadError | None]
"""What any new request of an owner (its account) would be told now; None where one may be taken."""


@dataclass(eq=False)
class FrontDoor:
    """All calls of a server, and the way between them and the engine's thread."""

    client: EngineClient
    opener: ChoiceOpener
    metrics: ServerMetrics
    settings: ServerSettings
    clock: Callable[[], float] = time.monotonic
    draining: bool = False
    refusal: Refusal = lambda account: None

    def __post_init__(self) -> None:
        self._calls: dict[str, Call] = {}
        self._by_request: dict[str, tuple[Call, LiveChoice]] = {}
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

    def check_room(self, caller: Caller) -> None:
        """OverloadError where no engine would take a request of this caller's, whatever it asks."""
        refusal = self.refusal(caller.key.share.account)
        if refusal is not None:
            raise refusal

    def open(
        self,
        id: str,
        prompts: Iterable[EncodedPrompt],
        params: SamplingParams,
        *,
        continues: bool,
        since: float | None = None,
        timeout: float = math.inf,
        priority: int = 0,
        salt: bytes = b"",
        expected: Expected | None = None,
        caller: Caller = OUTSIDER,
    ) -> Call:
        """Check everything about a call, submit nothing. Raises RequestError, or DrainingError.

        continues   the text continues the prompt's (completions), rather than standing alone (chat)
        since       when the client began to ask, in seconds on `clock`: its deadline counts from
                    there; default: now
        timeout     seconds that the client gives it, at most request_timeout
        priority, salt   as in EngineRequest
        expected    what is looked for in a chat's reply
        caller      whose it is: it counts among that one's, and takes turns with others'
        """
        if self.draining:
            raise DrainingError
        now = self.clock()
        deadline = (now if since is None else since) + min(self.settings.request_timeout, timeout)
        ids = (f"{id}-{index:04d}" for index in count())
        choices: list[LiveChoice] = []
        for prompt_index, prompt in enumerate(prompts):
            opened = self.opener.open(
                prompt,
                params,
                ids,
                continues=continues,
                arrival=now,
                priority=priority,
                deadline=deadline,
                salt=salt,
                expected=expected,
                share=caller.key.share,
            )
            for one in opened:
                choices.append(
                    LiveChoice(
                        index=len(choices),
                        prompt_index=prompt_index,
                        request=one.request,
                        assembler=one.assembler,
                        times=SequenceTimes(now),
                    )
                )
        return Call(self, id, params, choices, caller)

    def admit(self, call: Call) -> None:
        """Submit a call's choices, all or none."""
        if self.draining:
            raise DrainingError
        if self._loop is None:
            raise EngineError("the engine has not been started")
        try:
            self._calls[call.id] = call
            self._idle.clear()
            for choice in call.choices:
                self._by_request[choice.request.id] = call, choice
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

    async def close(self, timeout: float) -> None:
        """End what is in flight and stop the engine within `timeout` seconds."""
        self.drain()
        self.abort_all()  # here, on the loop: what it wakes up is the loop's
        await asyncio.to_thread(self.client.close, timeout)

    def _deliver(self, outputs: list[StepOutput]) -> None:
        """On the engine's thread, once a step: one hop to the loop for all of a step's outputs."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._route, outputs, self.clock())
        except RuntimeError:
            log.info("the event loop is closed; %d outputs have no reader", len(outputs))

    def _route(self, outputs: list[StepOutput], now: float) -> None:
        for output in outputs:
            if output.request_id in self._by_request:
                call, choice = self._by_request[output.request_id]
                try:
                    call.receive(choice, output, now)
                except Exception as error:  # that call's; the step's other outputs are others'
                    call.end(failure(f"an output of {call.id}", error))
