"""An engine in another process answers as one in this, and ends whatever happens to either."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from engine.collector import Collector
from engine.test_engine import engine, tokens
from moebius.engine import supervisor, wire
from moebius.engine.client import StepOutput
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.remote import RemoteClient
from moebius.engine.supervisor import EngineProcess
from moebius.errors import (
    ContextExceededError,
    EngineError,
    OverloadError,
    RequestError,
    WeightsError,
    WireError,
)
from moebius.parallel.key import ClusterKey
from moebius.parallel.meet import Listener
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams
from moebius.schedule.request import Request

KEY = secrets.token_bytes(32)
CONFIG = EngineConfig(
    kv_cache_memory_bytes=2**20, max_model_len=512, max_num_seqs=4, max_queue_requests=8
)


class There(Collector):
    """A process with an engine, and what its client delivered."""

    def __init__(self, process: EngineProcess, directory: Path, isa: str = "") -> None:
        super().__init__()
        self.process = process
        self.planned: list[wire.Planned] = []
        launch = wire.Launch(str(directory), CONFIG, KEY, frozenset({0, 2}), "warning", isa=isa)
        self.client: RemoteClient = process.launch(launch, self.planned.append)
        self.client.start(self)
        self.hasher = self.client.info.hasher(KEY)

    def ask(self, id: str, prompt: list[int], **params: object) -> EngineRequest:
        info = self.client.info
        wanted = SamplingParams(**{"ignore_eos": True, "max_tokens": 12, **params})
        return EngineRequest.create(
            id,
            prompt,
            wanted,
            info.limits,
            arrival=time.monotonic(),
            eos_ids=info.eos_ids,
            hasher=self.hasher,
        )

    def submit(self, *requests: EngineRequest) -> None:
        for request in requests:
            self.client.submit(request)

    def wait_until_ended(self, *ids: str) -> None:
        self.wait(lambda: all(map(self.ended, ids)), 60)


@contextmanager
def there(directory: Path) -> Iterator[There]:
    with EngineProcess() as process:
        yield There(process, directory)
    assert process.exit_status is not None


def test_a_process_answers_as_an_engine_here(tiny_model: Path) -> None:
    here = engine(tiny_model)
    with there(tiny_model) as other:
        info = other.client.info
        assert info.fingerprint == here.info.fingerprint and info.eos_ids == {0, 2}
        (planned,) = other.planned
        assert planned.batch_invariant and planned.kernels == here.runner.ops.name
        assert ("context", "512", "tokens") in planned.rows
        many = [
            other.ask("greedy", [5] * 40, temperature=0),
            other.ask("drawn", [7, 8, 9], seed=3, top_p=0.9, presence_penalty=0.5, logprobs=2),
            other.ask("scored", list(range(10, 60)), temperature=0, prompt_logprobs=1, logprobs=0),
            other.ask(
                "biased", [7], seed=4, logit_bias={9: 5.0}, min_tokens=3, stop_token_ids=(9,)
            ),
        ]
        other.submit(*many)
        other.wait_until_ended(*(request.id for request in many))
        for request in many:
            expected = alone(here, request)
            got = other.outputs[request.id]
            assert tokens(got) == tokens(expected)
            for field in ("logprobs", "prompt_logprobs"):
                assert [x for s in got for x in getattr(s, field)] == [
                    x for s in expected for x in getattr(s, field)
                ]
            assert got[-1].finish_reason is expected[-1].finish_reason
            assert all(request.arrival <= output.at <= time.monotonic() for output in got)

        # What is there of a prefix is found by the hash that the front has made.
        other.submit(other.ask("again", [5] * 40, temperature=0))
        other.wait_until_ended("again")
        assert other.outputs["again"][-1].num_cached_tokens == 32
        # A replay: the rest of what was drawn, and the same.
        drawn = tokens(other.outputs["drawn"])
        other.submit(replace(many[1], id="replay", output_ids=tuple(drawn[:5])))
        other.wait_until_ended("replay")
        assert tokens(other.outputs["replay"]) == drawn[5:]

        # Both are sent to whole groups of processes; the front finishes its requests first.
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(other.process.pid, number)
        refused_and_aborted(other, other.ask("long", [5, 6], max_tokens=400))
    assert other.process.exit_status == 0


def refused_and_aborted(other: There, long: EngineRequest) -> None:
    """Errors of several classes, and an abort, come back as what they are."""
    # A prompt of 16 tokens has one full block, and these are the hashes of one that has none.
    other.submit(
        replace(long, id="hashes", prompt_ids=tuple(range(16))),
        replace(long, id="context", max_tokens=511),
        replace(long, id="token", prompt_ids=(10**6,), prompt_hashes=None),
    )
    other.wait_until_ended("hashes", "context", "token")
    kinds = {id: type(other.outputs[id][-1].error) for id in ("hashes", "context", "token")}
    assert kinds == {"hashes": WireError, "context": ContextExceededError, "token": RequestError}
    crowd = [replace(long, id=f"crowd{i}") for i in range(30)]
    other.submit(*crowd)
    other.wait(lambda: any(tokens(other.outputs.get(request.id, [])) for request in crowd))
    for request in crowd:
        other.client.abort(request.id)
    other.wait_until_ended(*(request.id for request in crowd))
    lasts = [other.outputs[request.id][-1] for request in crowd]
    full = [last.error for last in lasts if isinstance(last.error, OverloadError)]
    assert full and all(error.retry_after > 0 for error in full)
    assert any(last.finish_reason is FinishReason.ABORT for last in lasts)


def alone(here: Engine, request: EngineRequest) -> list[StepOutput]:
    here.add(Request(request))
    steps: list[StepOutput] = []
    while here.has_work:
        steps += here.step()
    return steps


# Every run has a killed one at the end of this file.
@pytest.mark.losses
@pytest.mark.parametrize("how", ["killed", "stopped, then killed here", "cut off"])
def test_what_was_unfinished_ends_with_the_process(tiny_model: Path, how: str) -> None:
    died: list[EngineProcess] = []
    told = threading.Event()

    def note(process: EngineProcess) -> None:
        died.append(process)
        told.set()

    with EngineProcess() as process:
        process.died = note
        other = There(process, tiny_model)
        other.submit(*(other.ask(str(i), [1, 2, 3], max_tokens=500) for i in range(3)))
        other.wait(lambda: len(other.outputs) == 3)
        if how == "killed":
            os.kill(process.pid, signal.SIGKILL)
        elif how == "cut off":
            other.client._channel.close()  # it sees that and ends by itself
        else:
            os.kill(process.pid, signal.SIGSTOP)
            process.kill()
        other.wait_until_ended("0", "1", "2")
        for steps in other.outputs.values():
            assert isinstance(steps[-1].error, EngineError)
        if how != "stopped, then killed here":
            assert told.wait(20) and died == [process]
    assert process.exit_status == (1 if how == "cut off" else -signal.SIGKILL)
    assert (how == "cut off") == ("exit status 1" in process.state)
    assert len(died) == (0 if how == "stopped, then killed here" else 1)
    assert not other.client.stats().ready


def test_an_engine_that_cannot_begin_says_why(tmp_path: Path, tiny_model: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(WeightsError, match=r"model\.safetensors"), EngineProcess() as process:
        There(process, tmp_path)
    assert process.exit_status is not None


def test_a_process_that_ends_before_it_is_loaded_is_one_clear_line(tiny_model: Path) -> None:
    line = r"ended by SIGKILL \(as the system does when memory runs out\) before the model"
    with pytest.raises(EngineError, match=line), EngineProcess() as process:
        os.kill(process.pid, signal.SIGKILL)
        There(process, tiny_model)
    directory = process._listener.address.parent  # type: ignore[union-attr]
    assert not directory.exists()


def test_a_program_that_cannot_be_started_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    with pytest.raises(EngineError, match="can be started: No such file"):
        EngineProcess()


def test_without_unix_sockets_the_two_prove_themselves(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows; the key goes by the environment, which is the process's own. It computes with
    the kernels that it is told, and not with the best that its host has, as the others of its group
    may lack them. Killed, it ends what was unfinished."""
    key = ClusterKey.draw()
    made = (Listener.tcp("127.0.0.1", 0, key), {"MOEBIUS_CLUSTER_KEY": key.text})
    monkeypatch.setattr(supervisor, "_private_listener", lambda _: made)
    died: list[EngineProcess] = []
    told = threading.Event()

    def note(process: EngineProcess) -> None:
        died.append(process)
        told.set()

    with EngineProcess() as process:
        process.died = note
        other = There(process, tiny_model, isa="portable")
        assert "_cpu-portable_" in other.client.info.fingerprint
        other.submit(other.ask("a", [1, 2, 3]))
        other.wait_until_ended("a")
        assert len(tokens(other.outputs["a"])) == 12
        other.submit(*(other.ask(str(i), [1, 2, 3], max_tokens=500) for i in range(3)))
        other.wait(lambda: len(other.outputs) == 4)
        os.kill(process.pid, signal.SIGKILL)
        other.wait_until_ended("0", "1", "2")
        assert all(isinstance(other.outputs[id][-1].error, EngineError) for id in ("0", "1", "2"))
        assert told.wait(20) and died == [process]
    assert process.exit_status == -signal.SIGKILL
    assert not other.client.stats().ready
