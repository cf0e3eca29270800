"""LLM over processes that share a model's experts: the answers of one process, and no process left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moebius import LLM, SamplingParams
from moebius.cluster.hosts import DevicePlace, OneHost
from moebius.engine.client import StepOutput
from moebius.errors import ConfigError, EngineError
from moebius.front.sessions import Session
from moebius.parallel.exchange import Epoch
from moebius.request.engine_request import EngineRequest
from tiny import write_tokenizer

SIZES = {"kv_cache_memory_bytes": 2**21, "max_model_len": 512, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def two(tiny_model: Path) -> Iterator[LLM]:
    with LLM(str(tiny_model), ranks=2, **SIZES) as llm:
        yield llm


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(320) for _ in range(rng.randint(1, 60))] for _ in range(count)]


def mapped(process: int, directory: Path) -> list[str]:
    """The files of a model that a process has mapped."""
    maps = Path(f"/proc/{process}/maps").read_text().splitlines()
    return [line for line in maps if str(directory) in line]


def test_ranks_of_one_node_map_their_weights(two: LLM, tiny_model: Path) -> None:
    """test_llm_nodes.py has those of several."""
    if len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) > 1:
        pytest.skip("this machine has several nodes")
    assert all(mapped(process.pid, tiny_model) for process in two.processes)


def test_two_ranks_answer_as_one_process(two: LLM, tiny_model: Path) -> None:
    params = [
        SamplingParams(
            temperature=i % 2, max_tokens=5 + i, seed=i, logprobs=2, ignore_eos=True, n=1 + i % 2
        )
        for i in range(12)
    ]
    with LLM(str(tiny_model), **SIZES) as one:
        expected = one.generate(prompts(12), params)
    found = two.generate(prompts(12), params)
    assert [each.outputs for each in found] == [each.outputs for each in expected]


@pytest.mark.parametrize("loss", [False, pytest.param(True, marks=pytest.mark.losses)])
def test_ranks_that_meet_in_a_process_group_answer_alike(
    two: LLM, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, loss: bool
) -> None:
    """As those with a GPU each do, over gloo in the place of NCCL; and again once one is lost. When
    it is closed no process is left, of the first ones and of those in their place, and it says so."""

    def place(host: OneHost, spec: object, epoch: Epoch, remotes: Any, device: str) -> DevicePlace:
        return DevicePlace(epoch, list(remotes.values()))

    params = [
        SamplingParams(temperature=i % 2, max_tokens=9, seed=i, logprobs=2, ignore_eos=True)
        for i in range(6)
    ]
    expected = two.generate(prompts(6), params)
    monkeypatch.setattr(OneHost, "place", place)
    with LLM(str(tiny_model), ranks=2, **SIZES) as grouped:
        found = grouped.generate(prompts(6), params)
        pids = [process.pid for process in grouped.processes]
        if loss:
            os.kill(pids[1], signal.SIGKILL)
        after = grouped.generate(prompts(6), params)
        pids += [process.pid for process in grouped.processes]
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    with pytest.raises(EngineError, match="stopped"):
        grouped.generate([1, 2])
    for answers in (found, after):
        assert [each.outputs for each in answers] == [each.outputs for each in expected]


def test_all_ranks_are_given_as_much_as_they_can_run(
    two: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And as many again, which wait."""
    submitted: list[int] = []
    honest = Session.outputs
    submit = two.client.submit

    def outputs(session: Session) -> list[StepOutput]:
        submitted.append(count)
        return honest(session)

    count = 0

    def counted(request: EngineRequest) -> None:
        nonlocal count
        count += 1
        submit(request)

    monkeypatch.setattr(Session, "outputs", outputs)
    monkeypatch.setattr(two.client, "submit", counted)
    two.generate([[1, 2]] * 40, SamplingParams(max_tokens=2, ignore_eos=True))
    assert submitted[0] == 2 * 2 * SIZES["max_num_seqs"] and count == 40


def test_what_ranks_send_each_other_is_counted(two: LLM) -> None:
    before = two.client.stats().traffic
    two.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))
    deadline = time.monotonic() + 10
    while (after := two.client.stats().traffic).bytes_out == before.bytes_out:
        assert time.monotonic() < deadline, "ranks say several times a second what they counted"
        time.sleep(0.05)
    assert after.calls > before.calls and after.seconds_waited >= before.seconds_waited


def test_an_answer_that_is_not_read_to_its_end_is_given_up(two: LLM) -> None:
    stream = two.stream_chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=400))
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while two.client.stats().running:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_more_ranks_than_experts_are_refused_before_a_process_starts(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="5 ranks cannot share the 4 experts of a layer"):
        LLM(str(tiny_model), ranks=5, **SIZES)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    from oracle import save_tiny

    save_tiny(tmp_path, "llama", vocab_size=320)
    write_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="this llama model has no experts"):
        LLM(str(tmp_path), ranks=2)


_SCRIPT = """
import sys, threading, time
from moebius import LLM, SamplingParams
from moebius.cluster.hosts import DevicePlace, OneHost
llm = LLM(sys.argv[1], ranks=2, kv_cache_memory_bytes=2**21, max_model_len=512, max_num_seqs=8)
def tell():
    while not llm.client.stats().running:
        time.sleep(0.01)
    print(*(process.pid for process in llm.processes), flush=True)
threading.Thread(target=tell).start()
try:
    llm.generate([[1, 2]] * 200, SamplingParams(max_tokens=400, ignore_eos=True))
except KeyboardInterrupt:
    print(len(llm.generate([1, 2], SamplingParams(max_tokens=9, ignore_eos=True))), flush=True)
"""


def test_ctrl_c_ends_what_runs_and_no_process_is_left(tiny_model: Path) -> None:
    """The LLM serves on after it, and is never closed: its processes end with the script."""
    command = [sys.executable, "-c", _SCRIPT, str(tiny_model)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        pids = [int(word) for word in run.stdout.readline().split()]
        assert len(pids) == 2
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
        assert run.stdout.readline() == "1\n"
        assert run.wait(30) == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
