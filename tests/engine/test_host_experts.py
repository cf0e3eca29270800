"""Models with experts in the host's memory beside a device, which is stood in for by another
backend on the CPU: one answer whatever happens around a request, and what tells placements apart."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_t5
from covering import rest
from engine.test_engine import make, prompts, run, tokens
from moebius.engine import load
from moebius.engine.config import EngineConfig
from moebius.engine.host_experts import ExpertOrder
from moebius.engine.load import load_engine, prepare
from moebius.engine.target import Target
from moebius.errors import ConfigError
from moebius.models.decoder import Decoder
from moebius.models.description import describe
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.models.store.mapped import MappedFiles
from moebius.moe.crossing import CrossingRows
from moebius.moe.on_host import HostDispatcher, HostExperts
from moebius.ops import Matrix, Ops
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.quantize.export import write_model as write_gguf
from oracle import save_tiny
from quantised import KINDS, write_quantised
from random_schedules import (
    MAX_MODEL_LEN,
    Schedule,
    answers,
    each_alone,
    groups_of,
    random_schedule,
    wishes,
)
from tiny import write_model, write_tokenizer

F32 = torch.float32
CACHE = {"kv_cache_memory_bytes": 2**20, "max_model_len": 128}
# Routed experts alone, biases, shared experts, narrower rows, and a dense part beside.
FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h", "gemma4_text"]


def beside(directory: Path, held: dict[int, Any], host: Ops, dtype: torch.dtype) -> HostExperts:
    config = open_checkpoint(directory).config
    top_k = max(part.router.top_k for part in config.feed_forward if part.router is not None)
    most = CrossingRows(2048, top_k, config.hidden_size, dtype)
    return HostExperts(host, held, config.experts, most)


def odd_experts(directory: Path) -> dict[int, range]:
    """Of each layer's experts every other one, those that are left in one layer taken in the next."""
    experts = open_checkpoint(directory).config.experts
    return {layer: range(layer % 2, count, 2) for layer, count in experts.items()}


EVERY_RUN = {("gpt_oss", F32), ("nemotron_h", torch.bfloat16)}


# Biases, and narrower rows; every run has the other families in the next test.
@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [
        case if case in EVERY_RUN else rest(*case)
        for case in product(FAMILIES, [torch.bfloat16, F32])
    ],
    ids=str,
)
def test_one_answer_in_any_batch(model_type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Alone, batched, chunked, preempted, with a warm cache and with drafts; on one thread of
    either and on two. The host's kernels have other bits than the device's."""
    save_tiny(tmp_path, model_type, vocab_size=300, max_position_embeddings=MAX_MODEL_LEN)
    held = odd_experts(tmp_path)
    rng = random.Random(model_type)

    def loaded(threads: int) -> Decoder:
        host = beside(tmp_path, held, CpuOps(threads, isa="portable"), dtype)
        return load_decoder(tmp_path, dtype, ops=CpuOps(threads), host=host)

    asked = [
        replace(wish, prompt=wish.prompt[-30:], params=replace(wish.params, max_tokens=40))
        for wish in wishes(6, 300, rng, free=True)
    ]
    decoder = loaded(1)
    expected = each_alone(decoder, asked)
    groups = groups_of(decoder)
    tight = Schedule(8, groups.most_blocks(MAX_MODEL_LEN, 64, 8), 6, 64, True, (0,) * 6, rounds=2)
    others = [random_schedule(len(asked), rng, groups) for _ in range(2)]
    other = loaded(2)
    for one, schedule in ((decoder, tight), *((other, each) for each in others)):
        seen = answers(one, asked, schedule)
        for found in seen.rounds:
            assert found == expected, schedule
        assert schedule is not tight or seen.preemptions
    if dtype == F32:
        plain = each_alone(load_decoder(tmp_path, dtype, ops=CpuOps(1)), asked)
        assert plain != expected, "it is not seen who computes what"


@pytest.mark.parametrize(
    "model_type",
    [rest("gpt_oss"), "qwen3_moe", "deepseek_v3", "gemma4_text"],
)
def test_all_on_the_host_by_the_same_kernels_is_the_model_itself(
    model_type: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path, model_type, vocab_size=300, max_position_embeddings=MAX_MODEL_LEN)
    asked = wishes(4, 300, random.Random(0), free=True)
    expected = each_alone(load_decoder(tmp_path, F32, ops=CpuOps(1)), asked)
    experts = open_checkpoint(tmp_path).config.experts
    for held in ({layer: range(count) for layer, count in experts.items()}, odd_experts(tmp_path)):
        host = beside(tmp_path, held, CpuOps(2), F32)
        decoder = load_decoder(tmp_path, F32, ops=CpuOps(2), host=host)
        kinds = [type(layer.mlp.dispatch) for layer in decoder.layers if layer.mlp.router]
        assert HostDispatcher in kinds
        assert each_alone(decoder, asked) == expected


def test_an_encoders_experts_lie_on_the_host_too(tmp_path: Path) -> None:
    """Where an expert takes some of a prompt's tokens only."""
    sizes = {"expert_capacity": 7, "num_sparse_encoder_layers": 2}
    tiny_t5.tiny("switch_transformers", vocab_size=300, **sizes).save_pretrained(tmp_path)
    asked = [
        replace(wish, params=replace(wish.params, prompt_logprobs=None))
        for wish in wishes(5, 300, random.Random(0), free=True)
    ]
    expected = each_alone(load_decoder(tmp_path, F32, ops=CpuOps(1)), asked)
    host = beside(tmp_path, odd_experts(tmp_path), CpuOps(1), F32)
    decoder = load_decoder(tmp_path, F32, ops=CpuOps(1), host=host)
    assert host.on_host(1) and host.on_device(1)
    assert each_alone(decoder, asked) == expected
    for found in answers(decoder, asked, Schedule(16, 400, 8, 2048, False, (0,) * 5, 1)).rounds:
        assert found == expected


def quantised(directory: Path, kind: str) -> Path:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64}
    save_tiny(directory, "qwen3_moe", vocab_size=320, max_position_embeddings=256, **sizes)
    write_tokenizer(directory)
    if kind != "q4_k_m":
        write_quantised(directory, KINDS[kind])
        return directory
    write_gguf(directory, directory / "tiny.gguf", kind)
    return directory / "tiny.gguf"


@pytest.mark.parametrize("kind", ["q4_k_m", "mxfp4", "fp8-block"])
def test_quantised_experts_are_read_where_they_lie(kind: str, tmp_path: Path) -> None:
    """A device holds a copy of the rest; the host's experts are the file's own pages."""
    path = quantised(tmp_path, kind)
    checkpoint = open_checkpoint(path)
    held = odd_experts(path)
    host = beside(path, held, CpuOps(1), F32)
    planned = checkpoint.plan_weights("float32", "cuda", CpuOps(1).formats(F32), host=host)
    for source, weight in zip(checkpoint.sources, planned, strict=True):
        there = source.expert is not None and source.expert[1] in held[source.expert[0]]
        assert weight.on_host == there
        if len(source.shape) == 2:
            assert weight.mapped == there, source.parameter
    decoder = load_decoder(path, F32, ops=CpuOps(1), host=host)
    experts = decoder.layers[0].mlp.experts
    assert isinstance(experts.down_proj.held()[0], Matrix)
    asked = wishes(4, 300, random.Random(1), free=True)
    expected = each_alone(load_decoder(path, F32, ops=CpuOps(1)), asked)
    assert each_alone(decoder, asked) == expected


@pytest.fixture
def stood_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for a device with memory of its own."""
    monkeypatch.setattr(load, "_device", lambda *_: torch.device("cpu"))


def answered(directory: Path, **options: Any) -> tuple[str, list[list[int]]]:
    """An engine's fingerprint, and what it answers."""
    engine = load_engine(directory, EngineConfig(**CACHE, **options))
    asked = [make(engine, f"r{n}", prompt, max_tokens=8) for n, prompt in enumerate(prompts(3))]
    found = [tokens(steps) for steps in run(engine, asked).values()]
    name = engine.info.fingerprint
    engine.close()
    return name, found


def test_a_fingerprint_names_the_placement(tiny_model: Path, stood_in: None) -> None:
    whole, expected = answered(tiny_model)
    names = {}
    for experts in (0, "cpu", 2, "2", 3, 4, "auto"):
        names[experts], found = answered(tiny_model, experts=experts)
        assert found == expected  # by the same kernels, wherever
    assert names[0] == names["cpu"] and names[2] == names["2"]
    # Where all of them are on the device nothing differs; and there is room for them.
    assert names[4] == names["auto"] == whole
    assert len(set(names.values())) == 4
    assert all(name.startswith(f"{whole}_{CpuOps(1).name}-") for name in (names[0], names[3]))


def test_the_start_table_says_where_experts_lie(tiny_model: Path, stood_in: None) -> None:
    prepared = prepare(tiny_model, EngineConfig(**CACHE, experts=1))
    assert prepared.batch_invariant
    rows = {what: (size, remark) for what, size, remark in prepared.rows()}
    size, remark = rows["experts"]
    assert size == "1"
    assert remark.startswith("of 4 a layer on cpu, the first by number; 3 in the host's memory")
    assert CpuOps(1).name in remark


def test_on_plain_pytorch_the_host_has_no_one_answer(
    tiny_model: Path, stood_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    backends = [CpuOps(1), ReferenceOps()]
    monkeypatch.setattr(load, "select_ops", lambda *_, **__: backends.pop(0))
    prepared = prepare(tiny_model, EngineConfig(**CACHE, experts="cpu"))
    assert prepared.workspace.batch_invariant(prepared.ops)
    assert not prepared.batch_invariant


def test_torch_leaves_the_processors_to_the_hosts_kernels(tiny_model: Path) -> None:
    card = Target(2**30, 2**30)
    for experts, threads in (("device", None), (2, 1)):
        config = EngineConfig(**CACHE, device="cuda", experts=experts)
        assert load._torch_threads(prepare(tiny_model, config, target=card), config) == threads


def test_pages_of_what_a_device_has_copies_of_are_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a checkpoint in float32 all is copied where bfloat16 is computed in, and nothing else."""
    save_tiny(tmp_path, "qwen3_moe", vocab_size=300)
    released: list[tuple[int, int]] = []
    monkeypatch.setattr(MappedFiles, "release", lambda _, file, spans: released.extend(spans))
    for dtype, part in ((torch.bfloat16, 1), (F32, 0)):
        released.clear()
        host = beside(tmp_path, odd_experts(tmp_path), CpuOps(1), dtype)
        load_decoder(tmp_path, dtype, ops=CpuOps(1), host=host)
        planes = open_checkpoint(tmp_path).tensors.values()
        size = sum(plane.stop - plane.start for plane in planes)
        assert sum(stop - start for start, stop in released) == part * size


def test_experts_may_stay_on_disk(tmp_path: Path, stood_in: None) -> None:
    sizes = {"hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16}
    write_model(tmp_path, **sizes)
    expected = answered(tmp_path)[1]
    assert answered(tmp_path, experts=5, mmap_cold=True)[1] == expected
    plan = prepare(tmp_path, EngineConfig(**CACHE, experts=5, mmap_cold=True)).plan
    # Of 11 experts of three matrices of 512 x 512 in each of two layers, one layer's have to fit.
    layer = 11 * 3 * 512 * 512 * 4
    assert plan.weights.on_disk == 0
    assert plan.host.weights.mapped == 2 * layer and plan.host.weights.on_disk == layer
    assert ("on disk", "33.0 MiB", "of these experts, read as they are needed") in (
        plan.host.rows_of_table()
    )


def loads_file(directory: Path, *layers: list[int]) -> str:
    file = directory / "loads.json"
    rows = [{"layer": layer, "pairs": pairs} for layer, pairs in enumerate(layers)]
    file.write_text(json.dumps({"layers": rows}))
    return str(file)


def test_the_busiest_are_on_the_device_where_loads_are_known(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = describe(tiny_model).config
    first = ExpertOrder.of(model, EngineConfig(experts=2))
    assert first.on_host(1) == {0: (1, 2, 3), 1: (1, 2, 3)}
    file = loads_file(tmp_path, [3, 9, 3, 7], [0, 0, 0, 5])
    order = ExpertOrder.of(model, EngineConfig(experts=2, expert_placement=file))
    assert order.on_host(2) == {0: (0, 2), 1: (1, 2)}  # ties to the lowest number
    assert order.words == f"the busiest by {file}"
    with pytest.raises(ConfigError, match="experts of layer 1, which has 4; they are another"):
        file = loads_file(tmp_path, [3, 9, 3, 7], [0, 0, 5])
        ExpertOrder.of(model, EngineConfig(experts=2, expert_placement=file))
    with pytest.raises(ConfigError, match="'none', which is no file"):
        ExpertOrder.of(model, EngineConfig(experts=2, expert_placement="none"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"experts": "gpu"}, "experts is 'gpu'; it must be device, cpu, auto, or how many"),
        ({"experts": -1}, "experts is -1; it must be"),
        ({"experts": 1.5}, "experts is 1.5; it must be"),
        ({"experts": True}, "experts is True; it must be"),
        ({"experts": "cpu", "device": "cpu"}, "but device is 'cpu': there all of the model"),
        ({"experts": 3, "ranks": 2}, "but ranks are 2, which share experts on CPUs only"),
        ({"experts": 3, "expert_placement": "balanced"}, "'balanced', but one rank holds all"),
        ({"experts": "cpu", "expert_placement": "loads.json"}, "'loads.json', but one rank"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(**options)


def test_models_that_have_no_such_experts(tiny_model: Path, tmp_path: Path, stood_in: None) -> None:
    with pytest.raises(ConfigError, match="layer of this model has 4; use 0 to 4, auto, cpu"):
        prepare(tiny_model, EngineConfig(experts=5))
    write_model(tmp_path, mlp_only_layers=[0, 1])
    with pytest.raises(ConfigError, match="has no experts, which is what may lie in the host's"):
        prepare(tmp_path, EngineConfig(experts="cpu"))


def test_without_a_device_there_is_no_beside(tiny_model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(ConfigError, match="beside a CUDA device, and torch finds none"):
        prepare(tiny_model, EngineConfig(experts="cpu"))


def test_the_hosts_kernels_compute_in_what_they_can(
    tmp_path: Path, stood_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device would compute a float16 checkpoint in float16."""
    write_model(tmp_path, dtype=torch.float16)
    monkeypatch.setattr(load, "choose_dtype", lambda *_: torch.float16)
    monkeypatch.setattr(load, "check_served", lambda *_: None)
    with pytest.raises(ConfigError, match="do not compute in float16; use --dtype bfloat16 or"):
        prepare(tmp_path, EngineConfig(experts="cpu"))
