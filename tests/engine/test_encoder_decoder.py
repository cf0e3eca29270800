"""Encoders and decoders through the whole engine: one answer, bit for bit, whatever else is read or
written beside it; and what an operator and a client are told."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from covering import chosen, each_value
from moebius import LLM, SamplingParams
from moebius.cli.main import main
from moebius.engine.client import StepOutput
from moebius.engine.config import EngineConfig
from moebius.engine.engine import Engine
from moebius.engine.load import load_engine, prepare
from moebius.engine.trace import replay
from moebius.errors import ConfigError, ContextLengthError, RequestError
from moebius.models.decoder import Decoder
from moebius.models.store.load import load_decoder
from moebius.request.engine_request import EngineRequest
from moebius.schedule.request import Request
from random_ranks import answers_of_ranks, load_ranks, random_placement
from random_schedules import (
    Answer,
    Schedule,
    Wish,
    alone,
    answers,
    build,
    each_alone,
    note,
    wishes,
)
from tiny import write_model
from tiny_t5 import save, tiny, write_tokenizer

cpu = pytest.importorskip("moebius.ops.cpu")
SWITCH = "switch_transformers"
KINDS = {
    SWITCH: {"expert_capacity": 7, "num_sparse_encoder_layers": 2},
    "t5": {"feed_forward_proj": "gated-gelu"},
}
ROOMY = Schedule(16, 400, 16, 2048, False, (0,) * 24, 1)


@cache
def decoder(kind: str, dtype: torch.dtype, threads: int = 1) -> Decoder:
    with TemporaryDirectory() as directory:
        tiny(kind, vocab_size=300, **KINDS[kind]).save_pretrained(directory)
        return load_decoder(Path(directory), dtype, ops=cpu.CpuOps(threads), mapped=False)


def asked_of(count: int, rng: random.Random) -> list[Wish]:
    """No log-probabilities of prompts: an encoder gives none. Nor grammars."""
    return [
        replace(wish, params=wish.params.with_(prompt_logprobs=None))
        for wish in wishes(count, 300, rng, free=True)
    ]


def schedules(count: int, rng: random.Random) -> Iterator[Schedule]:
    """Steps that hold the longest prompt, in caches of one sequence's blocks and of many's."""
    for blocks in (0, 6, 400):
        size = rng.choice((4, 8, 16, 24))
        yield Schedule(
            block_size=size,
            num_blocks=-(-256 // size) + blocks,
            max_num_seqs=rng.choice((3, 16)),
            max_num_batched_tokens=rng.choice((151, 170, 2048)),
            prefix_caching=False,
            arrivals=tuple(rng.choice((0, 0, rng.randint(0, 30))) for _ in range(count)),
            rounds=1,
        )


@pytest.mark.parametrize(
    ("kind", "dtype"), each_value(sorted(KINDS), [torch.bfloat16, torch.float32]), ids=str
)
def test_one_answer_whatever_is_read_beside_it(kind: str, dtype: torch.dtype) -> None:
    rng = random.Random(f"{kind} {dtype}")
    asked = asked_of(14, rng)
    expected = each_alone(decoder(kind, dtype), asked)
    assert len({tuple(tokens) for tokens, _, _ in expected.values()}) > 7
    for schedule in schedules(len(asked), rng):
        seen = answers(decoder(kind, dtype, rng.choice((1, 2))), asked, schedule)
        assert seen.rounds == [expected], schedule


def test_preempted_requests_read_their_prompts_again() -> None:
    """Short prompts and long answers, for which no room is promised."""
    rng = random.Random(5)
    one = decoder(SWITCH, torch.bfloat16)
    params = SamplingParams(max_tokens=60, temperature=1.0, ignore_eos=True, logprobs=1)
    asked = [
        Wish(f"r{i}", tuple(rng.randrange(300) for _ in range(9)), params, i) for i in range(8)
    ]
    expected = each_alone(one, asked)
    seen = answers(one, asked, Schedule(4, 64, 8, 64, False, (0,) * 8, 1))
    assert seen.rounds == [expected] and seen.preemptions > 3


def test_steps_that_failed_are_made_again() -> None:
    rng = random.Random(2)
    one = decoder(SWITCH, torch.float32)
    asked = asked_of(12, rng)
    expected = each_alone(one, asked)
    interrupts = 0

    def make_step(engine: Engine) -> list[StepOutput]:
        nonlocal interrupts
        if rng.random() < 0.4:
            with pytest.MonkeyPatch.context() as patch:
                execute = engine.runner.execute

                def interrupted(inputs):
                    execute(inputs)
                    raise KeyboardInterrupt

                patch.setattr(engine.runner, "execute", interrupted)
                try:
                    engine.step()
                except KeyboardInterrupt:
                    interrupts += 1
        return engine.step()

    schedule = replace(ROOMY, max_num_batched_tokens=200, arrivals=(0,) * 12)
    seen = answers(one, asked, schedule, make_step)
    assert seen.rounds == [expected] and interrupts > 3


def test_a_replay_goes_on_where_the_lost_engine_was() -> None:
    one = decoder(SWITCH, torch.bfloat16)
    params = SamplingParams(max_tokens=12, temperature=0.8, ignore_eos=True, logprobs=2)
    wish = Wish("r", tuple(range(40, 90)), params, 7)
    tokens, logprobs, _ = alone(one, wish)
    for known in (1, 5, 11):
        engine = build(one, ROOMY)
        given = EngineRequest.create(
            "r", wish.prompt, params, engine.info.limits, arrival=0.0, seed=7,
            output_ids=tokens[:known],
        )  # fmt: skip
        found: dict[str, Answer] = {"r": ([], [], [])}
        engine.add(Request(given, engine.info.start_ids))
        while engine.has_work:
            for output in engine.step():
                note(output, found)
        assert found["r"][:2] == (tokens[known:], logprobs[known:])


@pytest.mark.parametrize("ranks", chosen([2, 3], lambda ranks: ranks == 3))
def test_one_answer_on_ranks(ranks: int, tmp_path: Path) -> None:
    """A rank reads prompts while another writes, or rests."""
    rng = random.Random(ranks)
    tiny(SWITCH, vocab_size=300, num_experts=5, expert_capacity=7).save_pretrained(tmp_path)
    one = load_decoder(tmp_path, torch.float32, ops=cpu.CpuOps(1))
    asked = asked_of(10, rng)
    expected = each_alone(one, asked)
    decoders = load_ranks(tmp_path, torch.float32, random_placement(one, ranks, rng))
    homes = [rng.randrange(ranks) for _ in asked]
    planned = [next(schedules(len(asked), rng)) for _ in decoders]
    assert answers_of_ranks(decoders, asked, homes, planned).rounds == [expected]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("switch")
    save(path, SWITCH, expert_capacity=3, d_model=32, d_ff=64)
    write_tokenizer(path)
    return path


def test_the_text_is_that_of_transformers(directory: Path) -> None:
    """Sentinels in the prompt are read, those in the answer are shown; the answer is a text of its
    own, and not the prompt's continuation."""
    from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    theirs = AutoModelForSeq2SeqLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    prompts = ["The <extra_id_0> walks in <extra_id_1> park", "a man", "a" * 30]
    params = SamplingParams(temperature=0, max_tokens=20)
    with LLM(str(directory), kv_cache_memory_bytes=2**21, max_model_len=128) as llm:
        outputs = llm.generate(prompts, params)
        for prompt, output in zip(prompts, outputs, strict=True):
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            assert list(output.prompt_token_ids) == ids[0].tolist() and ids[0, -1] == 1
            drawn = theirs.generate(ids, max_new_tokens=20, do_sample=False)[0, 1:].tolist()
            assert list(output.outputs[0].token_ids) == drawn
            shown = [i for i in drawn if i > 2]  # neither pad nor end nor unknown
            assert output.outputs[0].text == tokenizer.decode(shown).replace("<unk>", "")
        drawn = llm.generate(prompts[0], params.with_(n=3, temperature=1.0, seed=1))[0]
        assert len({choice.text for choice in drawn.outputs}) > 1
        with pytest.raises(RequestError, match="an encoder reads the prompt"):
            llm.generate(prompts[0], params.with_(prompt_logprobs=1))
        with pytest.raises(RequestError, match="no chat template"):
            llm.chat([{"role": "user", "content": "a man"}])
        with pytest.raises(RequestError, match="127"):
            llm.generate([[5] * 127], params)
        assert (
            len(llm.generate([[5] * 126], params.with_(max_tokens=None))[0].outputs[0].token_ids)
            == 1
        )


def test_a_prompt_longer_than_a_step_is_refused(directory: Path) -> None:
    with LLM(str(directory), kv_cache_memory_bytes=2**21, max_num_batched_tokens=64) as llm:
        params = SamplingParams(temperature=0, max_tokens=2)
        assert llm.generate([[5] * 64], params)[0].outputs[0].token_ids
        with pytest.raises(
            ContextLengthError, match="65 tokens, which an encoder reads in one step"
        ):
            llm.generate([[5] * 65], params)


def test_capacity_is_as_published_or_none(directory: Path) -> None:
    """Without one the answer is that of a checkpoint whose experts have room for all."""
    prompt = [[5, 9, 5, 5, 7, 5, 8, 5, 5, 5, 5, 6] * 3]
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1)
    found, names = [], []
    with TemporaryDirectory() as other:
        save(Path(other), SWITCH, expert_capacity=1000, d_model=32, d_ff=64)
        write_tokenizer(Path(other))
        for where, capacity in (
            (directory, "published"),
            (directory, "none"),
            (other, "published"),
        ):
            with LLM(str(where), kv_cache_memory_bytes=2**21, switch_capacity=capacity) as llm:
                found.append(llm.generate(prompt, params)[0].outputs[0].logprobs)
                names.append(llm.client.info.fingerprint)
    assert found[0] != found[1] == found[2] and len(set(names)) == 3


def test_what_does_not_go_together_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_cache_dtype int8 does not go with an encoder"):
        prepare(directory, EngineConfig(kv_cache_dtype="int8"))
    with pytest.raises(ConfigError, match="switch_capacity is 'some'"):
        EngineConfig(switch_capacity="some")
    write_model(tmp_path)
    with pytest.raises(ConfigError, match=r"experts of qwen3_moe models take all tokens anyway"):
        prepare(tmp_path, EngineConfig(switch_capacity="none"))


def test_the_plan_counts_what_is_kept(directory: Path) -> None:
    """Two decoder layers with keys and values of 3 heads of 10, of the prompt's tokens as of the
    answer's; nothing of an encoder's layers, and nothing that grows with the sequences that run."""
    prepared = prepare(directory, EngineConfig(max_model_len=64, kv_cache_memory_bytes=2**20))
    plan = prepared.plan
    # The kernels hold values in vectors of 16.
    assert plan.bytes_per_token == 2 * 3 * (10 + 16) * 4
    assert plan.states == 0
    assert prepared.workspace.recorded and prepared.batch_invariant
    engine = load_engine(directory, EngineConfig(max_model_len=64, kv_cache_memory_bytes=2**20))
    assert not engine.info.prefix_caching and not engine.scheduler.pool.enable_prefix_caching
    assert engine.info.start_ids == (0,) and engine.info.limits.max_model_len == 63


@pytest.mark.parametrize("recipe", chosen(["q8_0", "q4_k_m"], lambda name: name == "q4_k_m"))
def test_weights_in_fewer_bits_give_one_answer(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many rows go by panels, one alone does not: the same bits."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sizes = {"d_model": 256, "d_ff": 256, "d_kv": 64, "num_heads": 4}
    save(tmp_path / "model", SWITCH, **sizes)
    write_tokenizer(tmp_path / "model")
    prompts = [[5, 9, 30, 7] * 9, [8] * 20, [11, 12]]
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=1)
    with LLM(str(tmp_path / "model"), kv_cache_memory_bytes=2**23, quantization=recipe) as llm:
        together = llm.generate(prompts, params)
        for prompt, one in zip(prompts, together, strict=True):
            assert llm.generate([prompt], params)[0].outputs == one.outputs


def test_a_trace_replays(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    with LLM(
        str(directory), kv_cache_memory_bytes=2**20, max_num_batched_tokens=32, max_num_seqs=4,
        trace=str(file),
    ) as llm:  # fmt: skip
        llm.generate([[5] * n for n in (30, 3, 31, 8, 20)], SamplingParams(max_tokens=9))
    report = replay(file)
    assert report.difference is None and report.requests == 5


def test_the_command_prints_the_answer_alone(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "The <extra_id_0> walks in <extra_id_1> park"
    words = [
        "generate",
        "--model",
        str(directory),
        "--temperature",
        "0",
        "--max-tokens",
        "5",
        prompt,
    ]
    sizes = ["--kv-cache-memory-bytes", str(2**20), "--max-num-seqs", "2"]
    monkeypatch.setattr("sys.argv", ["moebius", *words, *sizes])
    with pytest.raises(SystemExit, match="0"):
        main()
    with LLM(str(directory), kv_cache_memory_bytes=2**20) as llm:
        (output,) = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=5))
    assert capsys.readouterr().out == output.outputs[0].text + "\n"


def test_a_batch_is_answered_by_the_server(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions are; chats, and log-probabilities of what the encoder read, are refused."""
    prompt = "a <extra_id_0> man"
    bodies = [
        ("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 6}),
        ("/v1/completions", {"prompt": prompt, "temperature": 0, "max_tokens": 6, "echo": True}),
        ("/v1/completions", {"prompt": prompt, "echo": True, "logprobs": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a man"}]}),
    ]
    lines = [
        json.dumps(
            {"custom_id": str(i), "method": "POST", "url": url, "body": {"model": "m", **body}}
        )
        for i, (url, body) in enumerate(bodies)
    ]
    asked, done = tmp_path / "asked.jsonl", tmp_path / "done.jsonl"
    asked.write_text("\n".join(lines) + "\n")
    words = ["generate", "--model", str(directory), "--batch", str(asked), "--output", str(done)]
    sizes = ["--kv-cache-memory-bytes", str(2**20), "--max-num-seqs", "4"]
    monkeypatch.setattr("sys.argv", ["moebius", *words, *sizes])
    with pytest.raises(SystemExit, match="0"):
        main()
    found = {}
    for line in done.read_text().splitlines():
        record = json.loads(line)
        found[record["custom_id"]] = record["response"]
    assert [found[str(i)]["status_code"] for i in range(4)] == [200, 200, 400, 400]
    plain, echoed = (found[str(i)]["body"]["choices"][0]["text"] for i in range(2))
    assert echoed == prompt + plain
    # a, a space, the gap, man, and the end.
    assert found["0"]["body"]["usage"]["prompt_tokens"] == 5
    assert "an encoder reads the prompt" in found["2"]["body"]["error"]["message"]
    assert "no chat template" in found["3"]["body"]["error"]["message"]
