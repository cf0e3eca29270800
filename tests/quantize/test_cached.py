"""Quantised when loaded: the same answers as its own numbers in float32, made once, whole."""

from __future__ import annotations

import fcntl
import io
import logging
import sys
import threading
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from covering import chosen
from moebius import LLM, SamplingParams
from moebius.cli.commands import app
from moebius.engine.config import EngineConfig
from moebius.engine.load import prepare
from moebius.errors import ConfigError, StorageError, WeightsError
from moebius.models.decoder import Decoder
from moebius.models.store import open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.ops import FORMATS
from moebius.quantize.cached import Quantized, cache_directory
from tiny import write_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moebius" / "quantized"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some rows are whole blocks of 256, some of 32, some of neither."""
    directory = tmp_path_factory.mktemp("wide")
    write_model(
        directory,
        hidden_size=256,
        num_attention_heads=4,
        head_dim=64,
        moe_intermediate_size=96,
        initializer_range=0.05,
    )
    return directory


def quantized(directory: Path, name: str = "q4_k_m") -> Quantized:
    return Quantized.of(open_checkpoint(directory), name)


def dequantized_twin(directory: Path, made: Quantized, out: Path) -> Path:
    """The checkpoint with every tensor as gguf-py reads it from the cache's file."""
    out.mkdir()
    for file in directory.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = {}
    for tensor in gguf.GGUFReader(made.file).tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        tensors[tensor.name] = torch.from_numpy(numbers.copy()).view(
            *reversed([int(size) for size in tensor.shape])
        )
    save_file(tensors, out / "model.safetensors")
    return out


def logits(decoder: Decoder) -> torch.Tensor:
    from moebius.nn.packed import PackedPast

    ids = torch.arange(5, 45)
    hidden, _ = decoder(ids, torch.arange(40), PackedPast(40))
    return decoder.logits(hidden)


@pytest.mark.parametrize(
    "name",
    chosen(
        ["q8_0", "q6_k", "q5_k_m", "q4_k_m", "mxfp4"],
        lambda name: name in ("q8_0", "q4_k_m", "mxfp4"),
    ),
)
def test_a_file_of_the_checkpoints_own_tensors(model: Path, tmp_path: Path, name: str) -> None:
    """gguf-py reads it, and the model computes what the same numbers give in float32."""
    made = quantized(model, name)
    made.make()
    twin = dequantized_twin(model, made, tmp_path / "twin")
    assert set(load_file(twin / "model.safetensors")) == set(load_file(model / "model.safetensors"))
    from moebius.ops.reference import ReferenceOps

    with torch.inference_mode():
        ours = load_decoder(made.checkpoint, torch.float32, ops=ReferenceOps())
        theirs = load_decoder(twin, torch.float32, ops=ReferenceOps())
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=0)


def test_an_engine_is_loaded_with_it(model: Path, cache: Path) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    options = {"kv_cache_memory_bytes": 2**22, "max_model_len": 64}
    with LLM(str(model), quantization="q8_0", **options) as llm:
        answer = llm.generate("def f(", greedy)[0].outputs[0].token_ids
        name = llm.client.info.fingerprint
    with LLM(str(model), **options) as llm:
        assert llm.client.info.fingerprint != name
    [file] = cache.glob("*.gguf")
    before = file.stat()
    with LLM(str(model), quantization="q8_0", **options) as llm:
        assert llm.generate("def f(", greedy)[0].outputs[0].token_ids == answer
        assert llm.client.info.fingerprint == name
    assert file.stat() == before


@pytest.mark.exhaustive  # threads that come at once find one file in every run
def test_ranks_share_one_file(model: Path, cache: Path) -> None:
    """Whichever comes first makes it, and the answer is that of one rank."""
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    options = {"kv_cache_memory_bytes": 2**22, "max_model_len": 64, "threads": 1}
    with LLM(str(model), quantization="q8_0", ranks=2, **options) as llm:
        answer = llm.generate("def f(", greedy)[0].outputs[0].token_ids
    [file] = cache.glob("*.gguf")
    before = file.stat()
    with LLM(str(model), quantization="q8_0", **options) as llm:
        assert llm.generate("def f(", greedy)[0].outputs[0].token_ids == answer
    assert file.stat() == before


def test_a_plan_makes_nothing(model: Path, cache: Path) -> None:
    config = EngineConfig(quantization="q8_0", kv_cache_memory_bytes=2**22, max_model_len=64)
    prepared = prepare(model, config)
    assert not cache.exists()
    formats = {weight.format for weight in prepared.weights if ".experts." in weight.name}
    assert formats == {"q8_0"} or not prepared.ops.formats(prepared.dtype) & {"q8_0"}
    [row] = [row for row in prepared.rows() if row[0] == "quantization"]
    assert row[1] == "q8_0"
    tensors = load_file(model / "model.safetensors").values()
    before = sum(tensor.nbytes for tensor in tensors)
    assert f"{before / 2**20:.1f} MiB become" in row[2]


def test_the_command_says_so(model: Path) -> None:
    asked = ["plan", str(model), "--quantization", "q4_k_m", "--max-model-len", "64"]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    assert "q4_k_m" in told.output


def test_what_is_no_recipe_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="no quantization 'q3'"):
        prepare(model, EngineConfig(quantization="q3"))


def test_a_damaged_file_is_made_anew(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = quantized(model, "q8_0")
    made.make()
    whole = made.file.read_bytes()
    for damage in ("cut", "byte", "head"):
        with made.file.open("r+b") as file:
            if damage == "cut":
                file.truncate(len(whole) - 100)
            else:
                file.seek(10 if damage == "head" else len(whole) // 2)
                file.write(b"\xff")
        with caplog.at_level(logging.WARNING):
            quantized(model, "q8_0").make()
        assert "made anew" in caplog.text, damage
        assert made.file.read_bytes() == whole
        caplog.clear()
        quantized(model, "q8_0").make()
        assert not caplog.text


def test_another_checkpoint_and_another_recipe_have_files_of_their_own(
    model: Path, tmp_path: Path
) -> None:
    write_model(tmp_path / "other", seed=1)
    files = {
        quantized(model).file,
        quantized(model, "q8_0").file,
        quantized(tmp_path / "other").file,
    }
    assert len(files) == 3
    assert {file.parent for file in files} == {cache_directory()}


def test_the_cache_is_where_the_system_has_its_caches(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_directory() == cache
    monkeypatch.setenv("HOME", "/home/somebody")
    for told in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", told)
        assert cache_directory() == Path("/home/somebody/.cache/moebius/quantized")


def test_without_a_home_it_has_to_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME"):
        cache_directory()


def test_a_cache_that_cannot_be_written_is_one_line(model: Path, cache: Path) -> None:
    """A file is in its way, or where the lock would be a directory."""
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    with pytest.raises(StorageError, match=r"quantized cannot be written to.* set XDG_CACHE_HOME"):
        quantized(model).make()
    cache.unlink()
    made = quantized(model)
    made.file.with_suffix(".lock").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"quantized cannot be written to.* set XDG_CACHE_HOME"):
        made.make()


def test_who_has_to_wait_is_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = quantized(model, "q8_0")
    made.file.parent.mkdir(parents=True)
    with made.file.with_suffix(".lock").open("w") as lock, caplog.at_level(logging.WARNING):
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=made.make)
        waiting.start()
        while "waits" not in caplog.text:
            waiting.join(0.01)
        assert not made.file.exists()
        fcntl.flock(lock, fcntl.LOCK_UN)
        waiting.join()
    assert made.file.exists()


def test_two_at_once(model: Path) -> None:
    """Both find the file whole; nothing else is left but the lock."""
    threads = [threading.Thread(target=quantized(model, "q8_0").make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = quantized(model, "q8_0")
    names = {file.name for file in made.file.parent.iterdir()}
    assert names == {made.file.name, made.file.with_suffix(".lock").name}
    assert gguf.GGUFReader(made.file).tensors


def test_a_process_that_was_killed_leaves_nothing_for_long(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot take back what it has begun; the next one does, and leaves other files alone."""
    made = quantized(model, "q8_0")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            made.make()
    [left] = [file for file in made.file.parent.iterdir() if file.name.startswith(".")]
    other = left.with_name(".other.tmp.gguf")
    other.touch()
    made.make()
    assert not left.exists() and other.exists()
    assert gguf.GGUFReader(made.file).tensors


def test_numbers_that_no_format_holds_are_named(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = torch.inf
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    made = quantized(broken)
    with pytest.raises(WeightsError, match=r"layers.1.self_attn.o_proj.weight.* cannot be quantis"):
        made.make()
    assert not made.file.exists()


def test_a_gguf_file_can_be_quantised_too(model: Path, tmp_path: Path) -> None:
    """To what the directory that it was made of gives."""
    from moebius.ops.reference import ReferenceOps
    from moebius.quantize.export import write_model

    file = tmp_path / "model.gguf"
    write_model(model, file, "f32")
    found = []
    for at in (model, file):
        made = quantized(at, "q8_0")
        made.make()
        with torch.inference_mode():
            found.append(logits(load_decoder(made.checkpoint, torch.float32, ops=ReferenceOps())))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_formats_are_those_of_the_recipe(model: Path) -> None:
    found = quantized(model).checkpoint.tensors
    assert found["model.layers.0.self_attn.q_proj.weight"].format == "q4_k"
    assert found["model.layers.1.mlp.experts.1.down_proj.weight"].format == "q8_0"  # rows of 96
    assert found["model.embed_tokens.weight"].format == "q6_k"
    assert found["model.layers.0.mlp.gate.weight"].format == "float32"
    assert all(tensor.format in FORMATS for tensor in found.values())


class Screen(io.StringIO):
    """Standard error of somebody who sits before it, or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_who_waits_at_a_terminal_sees_how_far_it_is(
    model: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    options = {"kv_cache_memory_bytes": 2**22, "max_model_len": 64}
    with LLM(str(model), quantization="q8_0", **options):
        pass
    assert ("quantising to q8_0" in screen.getvalue()) == terminal
