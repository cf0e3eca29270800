"""`--speculative ngram` as it is asked for: measured costs, the very answers, what is said where it
cannot be."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moebius
from covering import chosen
from moebius.cli.commands import app
from moebius.engine.config import EngineConfig
from moebius.engine.drafting import step_costs
from moebius.engine.engine import Engine
from moebius.engine.load import load_engine, prepare
from moebius.engine.trace import replay
from moebius.errors import ConfigError
from moebius.llm import LLM
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams
from moebius.schedule.drafts import DraftingScheduler, StepCosts
from moebius.schedule.request import Request
from oracle import save_tiny

BUNDLED = Path(moebius.__file__).parent / "bundled"
CONFIG = EngineConfig(
    speculative="ngram", max_model_len=512, max_num_seqs=8, kv_cache_memory_bytes=2**24
)
LOOP = "for each in range(10):\n    print(each)\n" * 6
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=2)


FREE = StepCosts([(1, 1.0), (64, 1.0)])


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts cost nothing, whatever this machine would measure: all right ones pay."""
    monkeypatch.setattr("moebius.engine.drafting.step_costs", lambda *_: FREE)


def test_an_engine_measures_what_its_steps_cost() -> None:
    """Which leaves no trace: nothing is cached, no expert was chosen."""
    engine = load_engine(BUNDLED, CONFIG)
    assert isinstance(engine.scheduler, DraftingScheduler)
    costs = engine.scheduler.costs
    assert [rows for rows, _ in costs.measured][:6] == [1, 2, 3, 4, 5, 6]
    seconds = [cost for _, cost in costs.measured]
    assert 0 < seconds[0] < 1 and seconds == sorted(seconds)
    assert engine.scheduler.most_rows == 64 and engine.scheduler.drained
    assert not any(any(layer.total_pairs) for layer in engine.expert_loads().layers)
    engine.close()


class Watch:
    """A clock that says how long each step of so many rows is to have taken."""

    def __init__(self, seconds: float) -> None:
        self.now = 0.0
        self.seconds = seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def test_a_slow_model_is_measured_at_few_sizes_alone() -> None:
    engine = load_engine(BUNDLED, replace(CONFIG, speculative="none"))
    slow = step_costs(engine.runner, 100, 64, Watch(1.5))
    assert [rows for rows, _ in slow.measured] == [1, 2, 3, 4, 5, 6, 8]
    fast = step_costs(engine.runner, 100, 64, Watch(0.001))
    assert [rows for rows, _ in fast.measured][-1] == 64
    few = step_costs(engine.runner, 1, 64, Watch(0.001))  # a block of 16 tokens
    assert [rows for rows, _ in few.measured][-1] == 16
    engine.close()


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("temperature", chosen([0.0, 0.1], lambda heat: heat > 0))
def test_llm_gives_the_same_answers_in_fewer_steps(temperature: float) -> None:
    """Tokens, log-probabilities, ends and texts; with a stop string in the midst of right drafts.

    Where it draws, by so low a temperature that both go on with the loop whatever the instruction
    set: at 0.6 one of them leaves it on some.
    """
    params = [
        GREEDY.with_(temperature=temperature, seed=7),
        GREEDY.with_(temperature=temperature, seed=8, stop=("e(1",)),
    ]
    told = []
    steps = []
    for speculative in ("none", "ngram"):
        options = {"max_model_len": 512, "kv_cache_memory_bytes": 2**24}
        with LLM("bundled", speculative=speculative, **options) as llm:
            told.append(llm.generate([LOOP, LOOP], params))
            stats = llm.client.stats()
        steps.append(stats.steps)
        assert bool(stats.drafts) == (speculative == "ngram")
    assert told[0] == told[1]
    assert steps[1] < 0.8 * steps[0]
    assert 0 < stats.accepted_tokens <= stats.draft_tokens
    assert sum(stats.accepted_per_place) == stats.accepted_tokens
    assert list(stats.accepted_per_place) == sorted(stats.accepted_per_place, reverse=True)


def serve(engine: Engine, prompt: str, max_tokens: int) -> Request:
    ids = [1 + ord(each) % 200 for each in prompt]
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    asked = EngineRequest.create("one", ids, params, engine.info.limits, arrival=0.0, seed=0)
    request = Request(asked)
    engine.add(request)
    while engine.has_work:
        engine.step()
    return request


@pytest.mark.usefixtures("free")
def test_a_trace_of_drafts_replays_to_the_same_decisions(tmp_path: Path) -> None:
    """By the costs that were measured then, and with no token spelt out."""
    path = tmp_path / "trace.jsonl"
    engine = load_engine(BUNDLED, replace(CONFIG, trace=str(path)))
    serve(engine, LOOP, 100)
    assert engine.stats().drafts
    engine.close()
    report = replay(path)
    assert report.difference is None and report.requests == 1 and report.steps > 10
    lines = path.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert records[1]["event"] == "drafting" and records[1]["most_rows"] == 64
    drafted = [i for i, each in enumerate(records) if each["event"] == "plan" and drafts(each)]
    changed = records[drafted[3]]
    changed["chunks"][0][-1][-1] += 1
    lines[drafted[3]] = json.dumps(changed)
    path.write_text("\n".join(lines))
    assert "chunks was" in str(replay(path).difference)


def drafts(plan: dict[str, list[list[list[int]]]]) -> list[int]:
    return [token for chunk in plan["chunks"] for token in chunk[-1]]


def test_states_cannot_be_taken_back_and_so_nothing_is_drafted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny(tmp_path, "qwen3_next", vocab_size=300, max_position_embeddings=512)
    prepared = prepare(tmp_path, CONFIG)
    reason = "the state of a recurrent layer cannot be taken back to the last right draft"
    assert ("drafts", "off", reason) in prepared.rows()
    with caplog.at_level(logging.WARNING):
        engine = load_engine(tmp_path, CONFIG, prepared=prepared)
    assert f"--speculative ngram is off: {reason}" in caplog.text
    assert len(serve(engine, LOOP, 30).output_ids) == 30 and not engine.stats().drafts
    engine.close()


def test_the_start_table_says_that_requests_draft() -> None:
    assert ("drafts", "ngram", "where they pay") in prepare(BUNDLED, CONFIG).rows()
    plain = prepare(BUNDLED, replace(CONFIG, speculative="none")).rows()
    assert "drafts" not in [what for what, _, _ in plain]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"speculative": "eagle"}, "speculative is 'eagle'; it must be one of none, ngram"),
        ({"speculative": "ngram", "ranks": 2}, "speculative is 'ngram', but ranks are 2: what a"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.usefixtures("free")
def test_generate_takes_the_option_and_prints_the_same_text() -> None:
    said = [
        CliRunner().invoke(
            app, ["generate", "--temperature", "0", "--max-tokens", "16", *option, LOOP]
        )
        for option in ([], ["--speculative", "ngram"])
    ]
    assert said[0].exit_code == 0 and said[0].stdout == said[1].stdout != ""
