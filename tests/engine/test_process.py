"""An engine in another process answers as one in this: everything crosses as frames, and is enough."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from engine.engine_process import Frames
from engine.test_engine import engine, tokens
from moebius.engine import wire
from moebius.engine.client import StepOutput
from moebius.engine.engine import Engine
from moebius.errors import (
    ContextExceededError,
    OverloadError,
    RequestError,
    WeightsError,
    WireError,
)
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request

HERE = Path(__file__).parent
KEY = secrets.token_bytes(32)


class Process:
    """The other end: what it was sent, by request."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self.outputs: defaultdict[str, list[StepOutput]] = defaultdict(list)

    def next(self) -> wire.FromEngine:
        frame = self._frames.receive()
        assert frame is not None, "the engine's process has ended"
        return wire.decode_from_engine(frame)

    def send(self, message: wire.ToEngine) -> None:
        self._frames.send(wire.encode(message))

    def listen(self) -> None:
        message = self.next()
        assert isinstance(message, wire.Outputs)
        for output in message.outputs:
            self.outputs[output.request_id].append(output)

    def listen_until_ended(self, *ids: str) -> None:
        while not all(self.outputs[id] and self.outputs[id][-1].finish_reason for id in ids):
            self.listen()


@contextmanager
def process(directory: Path) -> Iterator[Process]:
    ours, theirs = socket.socketpair()
    ours.settimeout(120)
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (
        ours,
        subprocess.Popen(
            [
                sys.executable,
                HERE / "engine_process.py",
                directory,
                str(theirs.fileno()),
                KEY.hex(),
            ],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
        ) as child,
    ):
        theirs.close()
        yield Process(Frames(ours))
        ours.close()
        assert child.wait(60) == 0


def test_a_process_answers_as_an_engine_here(tiny_model: Path) -> None:
    here = engine(tiny_model)
    with process(tiny_model) as there:
        loaded = there.next()
        assert isinstance(loaded, wire.Loaded)
        info = loaded.info
        assert info.fingerprint == here.info.fingerprint
        hasher = info.hasher(KEY)

        def ask(id: str, prompt: list[int], **params: object) -> EngineRequest:
            wanted = SamplingParams(**{"ignore_eos": True, "max_tokens": 12, **params})
            return EngineRequest.create(
                id, prompt, wanted, info.limits, arrival=0.0, eos_ids=info.eos_ids, hasher=hasher
            )

        many = [
            ask("greedy", [5] * 40, temperature=0),
            ask("drawn", [7, 8, 9], seed=3, top_p=0.9, presence_penalty=0.5, logprobs=2),
            ask("scored", list(range(10, 60)), temperature=0, prompt_logprobs=1, logprobs=0),
            ask("biased", [7], seed=4, logit_bias={9: 5.0}, min_tokens=3, stop_token_ids=(9,)),
        ]
        for request in many:
            there.send(wire.Submit(request))
        there.listen_until_ended(*(request.id for request in many))
        for request in many:
            expected = alone(here, request)
            got = there.outputs[request.id]
            assert tokens(got) == tokens(expected)
            for field in ("logprobs", "prompt_logprobs"):
                assert [x for s in got for x in getattr(s, field)] == [
                    x for s in expected for x in getattr(s, field)
                ]
            assert got[-1].finish_reason is expected[-1].finish_reason

        # What is there of a prefix is found by the hash that the front has made.
        there.send(wire.Submit(ask("again", [5] * 40, temperature=0)))
        there.listen_until_ended("again")
        assert there.outputs["again"][-1].num_cached_tokens == 32
        # A replay: the rest of what was drawn, and the same.
        drawn = tokens(there.outputs["drawn"])
        there.send(wire.Submit(replace(many[1], id="replay", output_ids=tuple(drawn[:5]))))
        there.listen_until_ended("replay")
        assert tokens(there.outputs["replay"]) == drawn[5:]

        refused_and_aborted(there, ask("long", [5, 6], max_tokens=400))


def refused_and_aborted(there: Process, long: EngineRequest) -> None:
    """Errors of several classes, and an abort, come back as what they are."""
    # A prompt of 16 tokens has one full block, and these are the hashes of one that has none.
    there.send(wire.Submit(replace(long, id="hashes", prompt_ids=tuple(range(16)))))
    there.send(wire.Submit(replace(long, id="context", max_tokens=511)))
    there.send(wire.Submit(replace(long, id="token", prompt_ids=(10**6,), prompt_hashes=None)))
    there.listen_until_ended("hashes", "context", "token")
    kinds = {id: type(there.outputs[id][-1].error) for id in ("hashes", "context", "token")}
    assert kinds == {"hashes": WireError, "context": ContextExceededError, "token": RequestError}
    crowd = [replace(long, id=f"crowd{i}") for i in range(30)]
    for request in crowd:
        there.send(wire.Submit(request))
    while not any(tokens(there.outputs[request.id]) for request in crowd):
        there.listen()
    for request in crowd:
        there.send(wire.Abort(request.id))
    there.listen_until_ended(*(request.id for request in crowd))
    lasts = [there.outputs[request.id][-1] for request in crowd]
    full = [last.error for last in lasts if isinstance(last.error, OverloadError)]
    assert full and all(error.retry_after > 0 for error in full)
    assert any(last.finish_reason is FinishReason.ABORT for last in lasts)


def alone(here: Engine, request: EngineRequest) -> list[StepOutput]:
    here.add(Request(request))
    steps: list[StepOutput] = []
    while here.has_work:
        steps += here.step()
    return steps


def test_an_engine_that_cannot_begin_says_why(tmp_path: Path, tiny_model: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with process(tmp_path) as there:
        message = there.next()
    assert isinstance(message, wire.Failed) and type(message.error) is WeightsError
    assert "model.safetensors" in str(message.error)
