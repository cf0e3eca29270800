"""Loading complains: every way in which a checkpoint can be wrong is refused, naming file and
tensor."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from covering import chosen
from moebius.errors import ConfigError, WeightsError
from moebius.models.decoder import Decoder
from moebius.models.family import family
from moebius.models.layout import sources
from moebius.models.store import fingerprint, open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.models.store.save import save_checkpoint
from moebius.ops import select_ops
from moebius.ops.cpu import CpuOps
from moebius.ops.formats import dtype_name
from moebius.ops.reference import ReferenceOps
from moebius.train.initial import init_weights
from oracle import (
    FAMILY,
    ONE_OF_EACH_KIND,
    Server,
    assert_close,
    load_theirs,
    save_tiny,
    saved_tiny,
)

PROMPT = [5, 66, 0, 17, 23, 23, 41, 8]
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("good")
    save_tiny(directory, "qwen3_moe")
    return directory


@pytest.fixture
def broken(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def logits(directory: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    server = Server(load_decoder(directory, dtype), block_size=4, num_blocks=8)
    server.step([(0, PROMPT)])
    return server.all_logits(0)


def assert_same_weights(one: Path, other: Path) -> None:
    state = load_decoder(other, torch.float32).state_dict()
    for name, parameter in load_decoder(one, torch.float32).named_parameters():
        assert torch.equal(parameter, state.pop(name)), name
    assert not state


def edit_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def edit_header(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header, leaving the data as it is."""
    raw = (directory / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + raw[8 + length :]
    )


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(WeightsError) as caught:
        load_decoder(directory, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_every_tensor_missing_is_named(good: Path, tmp_path: Path) -> None:
    tensors = load_file(good / "model.safetensors")
    for name in tensors:
        shutil.copy(good / "config.json", tmp_path)
        save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors")
        refused(tmp_path, "model.safetensors", repr(name), "missing")


def test_left_over_tensor(broken: Path) -> None:
    edit_tensors(broken, lambda t: t.update({"model.layers.7.extra.weight": torch.zeros(3)}))
    refused(broken, "model.layers.7.extra.weight", "left over")


def test_wrong_shape(broken: Path) -> None:
    edit_tensors(broken, lambda t: t.update({EXPERT: torch.zeros(24, 14)}))
    refused(broken, EXPERT, "[24, 14]", "[14, 24]")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_wrong_dtype(broken: Path, dtype: torch.dtype) -> None:
    edit_tensors(broken, lambda t: t.update({EXPERT: t[EXPERT].to(dtype)}))
    refused(broken, EXPERT, "dtype")


def test_truncations(good: Path, tmp_path: Path) -> None:
    raw = (good / "model.safetensors").read_bytes()
    shutil.copy(good / "config.json", tmp_path)
    for size in (0, 1, 7, 8, 9, 500, len(raw) // 2, len(raw) - 4096, len(raw) - 1):
        (tmp_path / "model.safetensors").write_bytes(raw[:size])
        refused(tmp_path, "model.safetensors")


def test_bytes_appended(broken: Path) -> None:
    with (broken / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 5)
    refused(broken, "5 bytes follow")


def test_flipped_header_bytes_never_load_wrong_weights(good: Path, tmp_path: Path) -> None:
    """Each corrupted header is refused, or says the very same as before (a flip within the
    metadata)."""
    raw = bytearray((good / "model.safetensors").read_bytes())
    length = struct.unpack("<Q", raw[:8])[0]
    shutil.copy(good / "config.json", tmp_path)
    expected = open_checkpoint(good).tensors
    refusals = 0
    for at in range(0, 8 + length, 23):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << (at % 8)
        (tmp_path / "model.safetensors").write_bytes(flipped)
        try:
            tensors = open_checkpoint(tmp_path).tensors
        except WeightsError:
            refusals += 1
        else:
            assert {n: (t.shape, t.start, t.stop) for n, t in tensors.items()} == {
                n: (t.shape, t.start, t.stop) for n, t in expected.items()
            }
    assert refusals > length // 23 * 0.9


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda h: h[EXPERT].update(shape=[-14, -24]), "shape"),
        (lambda h: h[EXPERT].update(shape=[14.0, 24]), "shape"),
        (lambda h: h[EXPERT].update(shape=[14, True]), "shape"),
        (lambda h: h[EXPERT].pop("shape"), "shape"),
        (lambda h: h[EXPERT].update(data_offsets=[0]), "data_offsets"),
        (lambda h: h[EXPERT].update(data_offsets=[8, 4]), "bytes stored"),
        (
            lambda h: h[EXPERT].update(data_offsets=[x - 4 for x in h[EXPERT]["data_offsets"]]),
            "overlap",
        ),
        (
            lambda h: h[EXPERT].update(
                data_offsets=[x + 10**12 for x in h[EXPERT]["data_offsets"]]
            ),
            "gap",
        ),
        (lambda h: h[EXPERT].update(dtype="F31"), "dtype"),
        (lambda h: h[EXPERT].update(dtype=7), "dtype"),
        (lambda h: h.update({EXPERT: 5}), "no valid shape"),
        (lambda h: h.pop(EXPERT), "gap"),
    ],
)
def test_bad_header_entries(
    broken: Path, change: Callable[[dict[str, Any]], None], word: str
) -> None:
    edit_header(broken, change)
    refused(broken, "model.safetensors", word)


@pytest.mark.parametrize("text", [b"[]", b"{", b"[" * 60_000, b'{"a": 1, "a": 1}', b"\xff\xff\xff"])
def test_header_that_is_no_object(broken: Path, text: bytes) -> None:
    (broken / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    refused(broken, "header")


def shard(directory: Path, count: int = 3) -> None:
    """Split the file into shards with an index, as the hub's large checkpoints are."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i in range(count):
        part = names[i::count]
        file = f"model-{i + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_sharded_equals_single(good: Path, broken: Path) -> None:
    shard(broken)
    assert_same_weights(broken, good)


def test_shard_missing(broken: Path) -> None:
    shard(broken)
    (broken / "model-00002-of-00003.safetensors").unlink()
    refused(broken, "model-00002-of-00003.safetensors", "missing")


@pytest.mark.parametrize("left", ["", "half"])
def test_a_file_that_changes_while_it_is_loaded(broken: Path, left: str) -> None:
    """Between the look at its header and the look at its numbers."""
    checkpoint = open_checkpoint(broken)
    file = broken / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2] if left else b"")
    with pytest.raises(WeightsError, match=r"model/model\.safetensors shrank while it was loaded"):
        load_decoder(checkpoint, torch.float32)
    file.unlink()
    with pytest.raises(WeightsError, match=r"model/model\.safetensors cannot be mapped: No such"):
        load_decoder(checkpoint, torch.float32)


def test_index_and_shards_disagree(broken: Path) -> None:
    shard(broken)
    index = broken / "model.safetensors.index.json"
    original = json.loads(index.read_text())
    for change, word in (
        (lambda m: m.pop(EXPERT), "left over"),
        (lambda m: m.update({"model.more.weight": "model-00001-of-00003.safetensors"}), "missing"),
        (lambda m: m.update({EXPERT: "../good/model.safetensors"}), "no file name"),
        (lambda m: m.update({EXPERT: 3}), "weight_map"),
    ):
        changed = json.loads(json.dumps(original))
        change(changed["weight_map"])
        index.write_text(json.dumps(changed))
        refused(broken, word)
    index.write_text("{")
    refused(broken, "JSON")


def test_no_weights_at_all(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    refused(broken, "neither")
    (broken / "pytorch_model.bin").write_bytes(b"")
    refused(broken, "pickle")


def test_tolerated_left_overs(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", tie_word_embeddings=True)
    before = load_decoder(tmp_path, torch.float32, mapped=False)

    def old_style(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(tmp_path, old_style)
    for ours, theirs in zip(
        load_decoder(tmp_path, torch.float32).parameters(), before.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.case("A6")
def test_no_parameter_may_be_left_without_values(good: Path) -> None:
    """What no tensor is the source of would stay on the meta device, which the kernels take for
    absent."""
    checkpoint = open_checkpoint(good)
    short = replace(checkpoint, sources=checkpoint.sources[:-2])
    left = [source.parameter for source in checkpoint.sources[-2:]]
    with pytest.raises(WeightsError, match=rf"{left[0]} \(and 1 more\)"):
        load_decoder(short, torch.float32)
    for parameter in load_decoder(checkpoint, torch.float32).parameters():
        assert not parameter.is_meta


@pytest.mark.parametrize(
    "model_type", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "dots1"]
)
def test_stacked_layout_of_transformers_5_equals_the_published_one(
    tmp_path: Path, model_type: str
) -> None:
    model = saved_tiny(tmp_path / "published", model_type)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    names = set(load_file(tmp_path / "stacked" / "model.safetensors"))
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    assert_same_weights(tmp_path / "published", tmp_path / "stacked")
    missing = "experts.down_proj"
    edit_tensors(tmp_path / "stacked", lambda t: t.pop(next(n for n in t if missing in n)))
    refused(tmp_path / "stacked", missing, "missing")


def mapped_ranges(file: Path) -> list[range]:
    """Where this process has a file mapped."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(file.resolve())):
            start, stop = line.split()[0].split("-")
            ranges.append(range(int(start, 16), int(stop, 16)))
    return ranges


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_mapped_or_copied_as_reported(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    """Matrices are mapped wherever `wanted` holds their numbers exactly."""
    model = saved_tiny(tmp_path, "granitemoe").to(stored)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.dtype == dtype_name(stored)
    ops = CpuOps(1)
    decoder = load_decoder(checkpoint, wanted, ops=ops)
    assert decoder.dtype == wanted
    original = load_file(tmp_path / "model.safetensors")
    parameters = dict(decoder.named_parameters())
    rows = checkpoint.plan_weights(dtype_name(wanted), formats=ops.formats(wanted))
    assert [row.name for row in rows] == [source.parameter for source in checkpoint.sources]
    assert {row.name for row in rows} == set(parameters)
    maps = mapped_ranges(tmp_path / "model.safetensors")
    exact = torch.promote_types(stored, wanted) == wanted
    for row, source in zip(rows, checkpoint.sources, strict=True):
        parameter, tensor = parameters[row.name], original[source.name]
        if source.entry is not None:
            tensor = tensor[source.entry, source.start : source.start + source.shape[0]]
        mapped = stored == wanted or (exact and tensor.ndim == 2)
        assert row.mapped == mapped == any(parameter.data_ptr() in at for at in maps)
        assert parameter.dtype == (stored if mapped else wanted)
        assert torch.equal(parameter, tensor.to(parameter.dtype))
        assert (row.format, row.nbytes) == (dtype_name(parameter.dtype), parameter.nbytes)
        assert row.count == tensor.numel()
        assert not parameter.requires_grad


def test_nothing_is_mapped_for_another_device_or_a_backend_that_reads_no_other_format(
    tmp_path: Path,
) -> None:
    saved_tiny(tmp_path, "llama").half().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    everything = {"bfloat16", "float16", "float32"}
    for rows in (
        checkpoint.plan_weights("float32", "cuda", everything),
        checkpoint.plan_weights("float32", "cpu", ReferenceOps().formats(torch.float32)),
    ):
        assert {(row.mapped, row.format) for row in rows} == {(False, "float32")}
    decoder = load_decoder(checkpoint, torch.float32, ops=ReferenceOps())
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}


def test_training_takes_every_weight_in_its_own_dtype(tmp_path: Path) -> None:
    saved_tiny(tmp_path, "llama").half().save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, torch.float32, mapped=False)
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in decoder.parameters())


def resident_kib(name: str) -> int:
    """Anonymous memory of this process, which mapped file pages are not part of."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise AssertionError(name)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_mapped_weights_take_no_memory_of_their_own(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", vocab_size=400_000, num_hidden_layers=1)
    size_kib = (tmp_path / "model.safetensors").stat().st_size // 1024
    before = resident_kib("RssAnon")
    decoder = load_decoder(tmp_path, torch.float32)
    assert decoder.embed_tokens.weight.sum().isfinite() and decoder.lm_head is not None
    assert resident_kib("RssAnon") - before < size_kib // 4


def test_trainable_copies(good: Path) -> None:
    decoder = load_decoder(good, torch.float32, mapped=False)
    with torch.no_grad():
        for parameter in decoder.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert not torch.equal(load_decoder(good, torch.float32).norm.weight, decoder.norm.weight)


# All but what transformers wants more of than is computed here: an indexer.
WHOLE = [name for name, sizes in FAMILY.items() if "index_topk" not in sizes]


@pytest.mark.parametrize("model_type", chosen(WHOLE, ONE_OF_EACH_KIND.__contains__))
def test_saved_checkpoint_is_read_by_transformers(tmp_path: Path, model_type: str) -> None:
    save_tiny(tmp_path / "theirs", model_type)
    checkpoint = open_checkpoint(tmp_path / "theirs")
    decoder = Decoder(checkpoint.config, select_ops("cpu", torch.float32))
    init_weights(decoder, torch.Generator().manual_seed(3), std=0.2)
    save_checkpoint(decoder, checkpoint.config_json, tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    with torch.inference_mode():
        theirs = load_theirs(tmp_path / "ours")(torch.tensor([PROMPT])).logits[0]
    assert_close(logits(tmp_path / "ours"), theirs)


def test_saved_dtype_is_written_and_read_back(good: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(good)
    decoder = load_decoder(checkpoint, torch.float32)
    save_checkpoint(decoder.state_dict(), checkpoint.config_json, tmp_path, dtype=torch.bfloat16)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir() if path.is_file()} == {0o644}
    again = open_checkpoint(tmp_path)
    assert again.dtype == "bfloat16" and again.config == checkpoint.config
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert torch.equal(
        load_decoder(again, torch.float32).norm.weight, decoder.norm.weight.bfloat16().float()
    )


@pytest.mark.parametrize("model_type", list(FAMILY))
def test_sources_cover_exactly_the_decoder(tmp_path: Path, model_type: str) -> None:
    save_tiny(tmp_path, model_type)
    checkpoint = open_checkpoint(tmp_path)
    decoder = Decoder(checkpoint.config, select_ops("cpu", torch.float32), device="meta")
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    assert {source.parameter: source.shape for source in checkpoint.sources} == shapes
    assert len(checkpoint.sources) == len(shapes)
    known = [set(sources(checkpoint.config, each)) for each in family(model_type).layouts]
    assert set(checkpoint.sources) in known


def test_fingerprint_tells_checkpoints_apart(good: Path, broken: Path) -> None:
    same = fingerprint(open_checkpoint(good))
    assert fingerprint(open_checkpoint(broken)) == same and len(same) == 16
    raw = bytearray((broken / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (broken / "model.safetensors").write_bytes(raw)
    changed = fingerprint(open_checkpoint(broken))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert len({same, changed, fingerprint(open_checkpoint(broken))}) == 3


def test_directory_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="no directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="JSON object"):
        open_checkpoint(tmp_path)
