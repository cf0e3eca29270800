"""Engines in processes of their own that a test loses in every way, behind one client."""

from __future__ import annotations

import gc
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.collector import Collector
from engine.test_engine import ask, engine
from moebius.cluster.engines import EngineProcesses
from moebius.engine import child, wire
from moebius.engine.client import StepOutput
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.request.constraint import Constraint, Grammar, ReasoningBudget
from moebius.request.engine_request import EngineRequest
from moebius.request.structured import StructuredOutput
from moebius.schedule.request import Request
from moebius.text import Tokenizer, load_tokenizer
from moebius.text.grammar import checked_grammar
from random_schedules import OBJECT, required_call

FAULTY = Path(__file__).parent.parent / "engine" / "faulty_process.py"
SECONDS = 120.0


REGEX = "[a-z ]{12}(,[0-9]{2}){4};"


def held_to(tokenizer: Tokenizer) -> dict[str, Constraint]:
    """What requests of this model are held to: longer answers than they may have, and short ones,
    which their grammars end; and reasoning that comes to the end of its budget."""
    asked = {
        "schema": StructuredOutput(json=OBJECT),
        "regex": StructuredOutput(regex=REGEX),
    }
    found = {
        kind: Constraint(Grammar(checked_grammar(each).text())) for kind, each in asked.items()
    }
    found["call"] = required_call(tokenizer)
    end = tuple(tokenizer.encode("</think>", False))
    found["budget"] = Constraint(
        Grammar(checked_grammar(asked["regex"]).text(), after=(end,)),
        budget=ReasoningBudget(12, start=(), end=end, begun=True),
    )
    return found


class Losses:
    """`client` is what a test talks to; `here` computes what each answer has to be."""

    def __init__(self, directory: Path, faults: Path, ranks: int, step_deadline: float) -> None:
        self.heard = Collector()
        self.here: Engine = engine(directory)
        self.requests: dict[str, EngineRequest] = {}
        self._faults = faults
        self.tokenizer = load_tokenizer(directory)
        self._held = held_to(self.tokenizer)
        config = EngineConfig(
            kv_cache_memory_bytes=2**20,
            max_model_len=512,
            max_num_seqs=32,
            step_deadline=step_deadline,
            threads=1,
            ranks=ranks,
        )
        self.processes = EngineProcesses(ranks, on_give_up=lambda: None)
        key = secrets.token_bytes(32)
        message = wire.Launch(str(directory), config, key, frozenset({0, 2}), "error")
        self.client = self.processes.launch(message)
        self.client.start(self.heard)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes.processes]

    def submit(
        self, id: str, prompt: list[int], constraint: Constraint | None = None, **params: Any
    ) -> None:
        request = ask(self.here, id, prompt, constraint=constraint, **params)
        self.requests[id] = request
        self.client.submit(request)

    def some(self, name: str, max_tokens: int = 60) -> list[str]:
        """Greedy and drawn ones, long and short, some of them held to something, of which tokens
        have come; their ids."""
        ids = [f"{name} {i}" for i in range(5)]
        for kind, constraint in self._held.items():
            ids.append(f"{name}, {kind}")
            warm: dict[str, Any] = {"temperature": 0.9, "seed": 1, "logprobs": 2}
            self.submit(ids[-1], [3, 5, 7], constraint, max_tokens=max_tokens, **warm)
        for i, id in enumerate(ids[:5]):
            prompt = [1 + (7 * i + k) % 300 for k in range(3 + 20 * i)]
            drawn = {"temperature": 0.9, "seed": i} if i % 2 else {}
            scored = {"prompt_logprobs": 1} if i == 4 else {}
            self.submit(id, prompt, max_tokens=max_tokens, logprobs=2, **drawn, **scored)
        self.heard.wait(lambda: all(map(self.tokens, ids[5:])), SECONDS)
        return ids

    def fault(self, name: str) -> None:
        """It happens to the process that comes first to where it can."""
        (self._faults / name).touch()

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.pids[rank], number)

    def tokens(self, id: str) -> list[int]:
        return [token for step in self.heard.outputs.get(id, []) for token in step.token_ids]

    def text(self, id: str) -> str:
        return self.tokenizer.decode(self.tokens(id), skip_special_tokens=False)

    def wait_for(self, *ids: str) -> None:
        self.heard.wait(lambda: all(map(self.heard.ended, ids)), SECONDS)

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def same(self, *ids: str) -> bool:
        """Whether all that was told of these is what one engine says that nothing happens to."""
        self.wait_for(*ids)
        return all(told(self.heard.outputs[id]) == told(self._alone(id)) for id in ids)

    def _alone(self, id: str) -> list[StepOutput]:
        self.here.add(Request(self.requests[id]))
        steps: list[StepOutput] = []
        while self.here.has_work:
            steps += self.here.step()
        return steps


def told(steps: list[StepOutput]) -> tuple[object, ...]:
    """What of a request's outputs does not depend on when they came."""
    return (
        [token for step in steps for token in step.token_ids],
        [entry for step in steps for entry in step.logprobs],
        [entry for step in steps for entry in step.prompt_logprobs],
        steps[-1].finish_reason,
    )


@contextmanager
def losses(
    directory: Path,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int = 1,
    step_deadline: float = 60.0,
) -> Iterator[Losses]:
    """At the end no process and no shared memory of it is left."""
    program = f"import runpy; runpy.run_path({str(FAULTY)!r}, run_name='__main__')"
    faults = scratch / "faults"
    faults.mkdir()
    gc.collect()  # what an earlier test has left may hold some, and go in the middle of this one
    files = shared_memory()
    with monkeypatch.context() as patch:
        patch.setenv("FAULTS", str(faults))
        patch.setattr(child, "_program", lambda: program)
        made = Losses(directory, faults, ranks, step_deadline)
        pids = made.pids
        try:
            yield made
            pids = made.pids
        finally:
            made.processes.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert shared_memory() == files


def shared_memory() -> int:
    """How many groups' segments this process holds open."""
    found = 0
    for file in Path("/proc/self/fd").iterdir():
        try:
            found += "moebius" in os.readlink(file)
        except FileNotFoundError:
            continue
    return found


KILL = signal.SIGKILL
STOP = signal.SIGSTOP
