"""An exception at the n-th call in the front's code of one request: that request ends, and its
neighbours, the server and what they share are as ever.

Every call counts that the request's own tasks make in the front's packages. The run that is part of
every test looks at some; `pytest -m faults` looks at all.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import moebius
from moebius.server.stream import Call
from server.serving import MODEL, Server, engine, run, serving, until

# A generator that is not read to its end is resumed once more, where nobody hears what it raises.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

ROOT = Path(moebius.__file__).parent
FRONT = tuple(str(ROOT / package) + "/" for package in ("server", "front", "text", "request"))
# What ends a request, whatever became of it: there is nothing behind it that could do so instead.
ENDS = {"__aexit__", "forget", "close", "abort"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CHATTED = {"messages": [{"role": "user", "content": "hello"}]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": (COMPLETIONS, {"prompt": "hello", "logprobs": 2, "echo": True, "stop": "zz"}),
    "completion stream": (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "stream": True}),
    "chat": (CHAT, {**CHATTED, "logprobs": True, "top_logprobs": 2}),
    "chat stream": (CHAT, {**CHATTED, "stream": True}),
    "prefill": (
        CHAT,
        {
            "messages": [*CHATTED["messages"], {"role": "assistant", "content": "so "}],
            "continue_final_message": True,
            "echo": True,
        },
    ),
    "tokenize": ("/tokenize", CHATTED),
    "refused": (COMPLETIONS, {"prompt": "a", "n": "two"}),
}
# A case makes some hundred calls; of these the default run fails every so many, and others each
# time that it is a prime.
STRIDE = 41

failing = contextvars.ContextVar("failing", default=False)


class OutOfLuck(Exception):
    """What is raised."""


class RaisesAt:
    """A trace function that raises at the n-th call of the request whose context is `failing`."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.calls = 0
        self.where = ""

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not failing.get() or not code.co_filename.startswith(FRONT):
            return
        if code.co_name in ENDS:
            return
        self.calls += 1
        if self.calls == self.n:
            self.where = f"{Path(code.co_filename).name}:{code.co_name}"
            raise OutOfLuck


@contextmanager
def tracing(trace: RaisesAt) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


async def asked(server: Server, path: str, body: dict[str, Any]) -> int:
    """The status of the request that is to fail; 0 where it ended without one."""
    failing.set(True)
    try:
        return (await server.post(path, {"model": MODEL, "max_tokens": 4, **body})).status_code
    except (OutOfLuck, RuntimeError, AssertionError):  # a response that broke off, or none
        return 0


async def fails_alone(server: Server, path: str, body: dict[str, Any], n: int) -> bool:
    """One request that fails at its n-th call, beside a neighbour; False where it makes fewer."""
    trace = RaisesAt(n)
    with tracing(trace):
        one = asyncio.create_task(asked(server, path, body))
        neighbour = asyncio.create_task(server.complete(prompt="near", seed=1, max_tokens=6))
        status = await asyncio.wait_for(one, 10)
        near = (await asyncio.wait_for(neighbour, 10))["choices"]
    where = f"call {n}, {trace.where}, status {status}"
    assert near == (await server.complete(prompt="near", seed=1, max_tokens=6))["choices"], where
    await until(lambda: server.engine.idle)
    await until(lambda: server.door.in_flight == 0)
    assert server.door.ready, where
    return trace.calls >= n


def sweep(name: str, stride: int) -> None:
    path, body = CASES[name]

    async def main() -> int:
        async with serving(engine()) as server:
            n = 1
            while await fails_alone(server, path, body, n):
                n += stride
            return n

    assert asyncio.run(main()) > (0 if name == "refused" else 2 * stride)


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_error_at_some_calls_ends_that_request_alone(name: str) -> None:
    sweep(name, STRIDE)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", sorted(CASES))
def test_an_error_at_any_call_ends_that_request_alone(name: str) -> None:
    sweep(name, 1)


def test_an_output_that_cannot_be_taken_ends_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine hands over a step's outputs together, whosever they are."""
    honest = Call.receive

    def receive(call: Call, *args: Any) -> None:
        if call.prompt_tokens == 1:
            raise OutOfLuck
        honest(call, *args)

    monkeypatch.setattr(Call, "receive", receive)

    async def check(server: Server) -> None:
        fields = {"prompt": [20, 21], "seed": 1, "max_tokens": 20}
        expected = (await server.complete(**fields))["choices"]
        wrong = [server.post(COMPLETIONS, {"prompt": [20], "max_tokens": 20}) for _ in range(3)]
        right = [server.complete(**fields) for _ in range(3)]
        answers = await asyncio.gather(*wrong, *right)
        assert [response.status_code for response in answers[:3]] == [500] * 3
        assert all(answer["choices"] == expected for answer in answers[3:])

    run(check, engine(step_seconds=0.001))
