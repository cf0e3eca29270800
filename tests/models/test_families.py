"""A new architecture is one short file, which touches no other."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.config_keys import as_json, derive
from moebius.errors import ConfigError, WeightsError
from moebius.models import families
from moebius.models.family import family, model_config, model_types, read_config
from moebius.models.store.load import load_decoder
from moebius.models.store.save import save_checkpoint
from moebius.ops import Ops, select_ops
from moebius.ops.reference import ReferenceOps
from oracle import FAMILY, TINY, Server, assert_close, load_theirs, save_tiny, tiny_of
from test_architecture import FILES, SOURCE, imported

FAMILIES = SOURCE / "models" / "families"
NEW = Path(__file__).parent / "new_families"
IDS = [5, 66, 0, 17, 23, 23, 41, 8, 30, 2, 60, 11, 1]
GEMMA: dict[str, Any] = {
    **TINY,
    "num_hidden_layers": 3,
    "head_dim": 10,
    "intermediate_size": 20,
    "query_pre_attn_scalar": 7,
    "sliding_window": 4,
}
NEWCOMERS: dict[str, dict[str, Any]] = {
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
}


@pytest.fixture
def with_new_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the files of NEW, and the tables that are made for them, lay among the families."""
    directory = tmp_path / "families"
    shutil.copytree(NEW, directory, ignore=shutil.ignore_patterns("__pycache__"))
    for kind in NEWCOMERS:
        (directory / f"{kind}.json").write_text(as_json(derive(kind)))
    shutil.copy(FAMILIES / "llama.json", directory / "renamed.json")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(directory)])
    yield
    for kind in (*NEWCOMERS, "renamed"):
        sys.modules.pop(f"{families.__name__}.{kind}", None)
        if hasattr(families, kind):
            delattr(families, kind)


def save(directory: Path, kind: str) -> Any:
    """A tiny model of transformers, saved with the weights of its norms as they are multiplied
    by."""
    from transformers import AutoConfig

    model = tiny_of(AutoConfig.for_model(kind, **NEWCOMERS[kind]))
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor += 1
    save_file(tensors, directory / "model.safetensors")
    return model


@pytest.mark.usefixtures("with_new_families")
@pytest.mark.parametrize(
    "ops", [ReferenceOps(), select_ops("cpu", torch.float32)], ids=lambda ops: ops.name
)
@pytest.mark.parametrize("kind", NEWCOMERS)
def test_a_family_that_was_dropped_in_serves_the_logits_of_transformers(
    kind: str, ops: Ops, tmp_path: Path
) -> None:
    """Sandwich norms, capped scores and logits, scaled embeddings, windows in some layers."""
    model = save(tmp_path, kind)
    server = Server(load_decoder(tmp_path, torch.float32, ops=ops), block_size=4, num_blocks=8)
    server.step([(0, IDS[:7])])
    for token in IDS[7:]:
        server.step([(0, [token])])
    with torch.inference_mode():
        assert_close(server.all_logits(0), model(torch.tensor([IDS])).logits[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        {"rope_parameters": None, "rope_theta": 50.0},
        {"rope_parameters": None, "partial_rotary_factor": 1.0},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_a_part_of_each_head_turns_as_transformers_reads_it(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny(tmp_path, "glm4_moe", head_dim=16)
    raw = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert "partial" not in " ".join(read_config(raw).ignored)
    server = Server(load_decoder(tmp_path, torch.float32), block_size=4, num_blocks=8)
    server.step([(0, IDS)])
    with torch.inference_mode():
        assert_close(server.all_logits(0), load_theirs(tmp_path)(torch.tensor([IDS])).logits[0])


# What checkpoints hold beside the model, and how a line names it.
BESIDE: list[tuple[str, dict[str, Any], list[str], str]] = [
    ("gemma3_text", {}, ["model.vision_tower.a.b.weight"], "*vision_tower.*"),
    ("exaone_moe", {}, ["mtp.fc.weight", "mtp.layers.0.mlp.gate_proj.weight"], "mtp.*"),
    ("ernie4_5_moe", {}, ["model.mtp_block.0.self_attn.q_proj.weight"], "model.mtp_*"),
    (
        "glm4_moe",
        {},
        ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.experts.0.up_proj.weight"],
        "model.layers.2.*",
    ),
    ("deepseek_v3", {}, ["model.layers.2.eh_proj.weight"], "model.layers.2.*"),
    (
        "hy_v3",
        {"num_hidden_layers": 3},
        [f"model.layers.{i}.{x}.weight" for i in (3, 4) for x in ("eh_proj", "enorm")],
        "model.layers.3.*, model.layers.4.*",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "names", "told"), BESIDE, ids=lambda x: str(x)[:20])
def test_what_is_no_part_of_the_model_is_left_out_with_a_line(
    kind: str,
    changes: dict[str, Any],
    names: list[str],
    told: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Layers that predict further tokens, and what sees images."""
    save_tiny(tmp_path, kind, **changes)
    plain = load_decoder(tmp_path, torch.float32).state_dict()
    tensors = load_file(tmp_path / "model.safetensors")
    beside = {name: torch.zeros(2) for name in names}
    save_file({**tensors, **beside}, tmp_path / "model.safetensors")
    with caplog.at_level("INFO", logger="moebius"):
        found = load_decoder(tmp_path, torch.float32).state_dict()
    assert [record.getMessage() for record in caplog.records][-1].endswith(
        f"{len(names)} tensors are left out, as no {kind} model here computes with them: {told}"
    )
    assert list(found) == list(plain)
    save_file(
        {**tensors, "model.layers.9.x.weight": torch.zeros(2)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(WeightsError, match=r"'model\.layers\.9\.x\.weight' is left over"):
        load_decoder(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"model_type": "llama4", "vision_config": {}}, "attend within chunks"),
        ({"model_type": "llama4_text"}, "attend within chunks"),
        ({"model_type": "phimoe"}, "depend on the longest sequence in the batch"),
        ({"model_type": "dbrx"}, "its norms subtract the mean"),
        ({"model_type": "nllb-moe"}, "transformers 5 computes something else"),
        ({"model_type": "mllama", "vision_config": {}}, "it reads images, which is not supported"),
    ],
)
def test_what_is_asked_for_and_missing_is_refused_with_its_reason(
    raw: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config(raw)
    message = str(caught.value)
    assert f"model_type {raw['model_type']!r} is not supported: " in message
    assert words in message and "\n" not in message


RENAMED = {
    "model.embed_tokens": "backbone.embeddings",
    "model.norm": "backbone.norm_f",
    "model.layers": "backbone.blocks",
    "lm_head": "output",
    "input_layernorm": "operator_norm",
    "post_attention_layernorm": "ffn_norm",
    "o_proj": "out_proj",
    "mlp.gate_proj": "ff.w1",
    "mlp.up_proj": "ff.w3",
    "mlp.down_proj": "ff.w2",
}


@pytest.mark.usefixtures("with_new_families")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("headless", [False, True])
def test_a_family_names_every_tensor(tied: bool, headless: bool, tmp_path: Path) -> None:
    """Also where a model was saved without a head, and so without what stands before names."""
    if headless and not tied:
        return
    save_tiny(tmp_path / "usual", "llama", tie_word_embeddings=tied)
    there = tmp_path / "renamed"
    shutil.copytree(tmp_path / "usual", there)
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps({**config, "model_type": "renamed"}))
    tensors = load_file(there / "model.safetensors")
    for name in list(tensors):
        new = name
        for usual, theirs in RENAMED.items():
            new = new.replace(usual, theirs)
        tensors[new.removeprefix("backbone.") if headless else new] = tensors.pop(name)
    save_file(tensors, there / "model.safetensors")
    ours = load_decoder(there, torch.float32).state_dict()
    usual_state = load_decoder(tmp_path / "usual", torch.float32).state_dict()
    assert list(ours) == list(usual_state)
    assert all(torch.equal(ours[name], usual_state[name]) for name in ours)
    save_checkpoint(ours, {**config, "model_type": "renamed"}, tmp_path / "again")
    named = {
        name if name == "output.weight" or not headless else f"backbone.{name}" for name in tensors
    }
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == named


def test_the_context_is_what_the_widest_rope_was_stretched_to() -> None:
    full = {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 32}
    ropes = {"sliding_attention": {"rope_type": "default"}, "full_attention": full}
    raw = {**TINY, **FAMILY["gemma3_text"], "model_type": "gemma3_text", "rope_parameters": ropes}
    assert model_config(raw).context == 64
    full["factor"] = 3.0
    assert model_config(raw).context == 96


def test_the_directory_is_the_list() -> None:
    assert "gemma2" not in model_types() and "llama" in model_types()
    assert set(model_types()) == {path.stem for path in FAMILIES.glob("[!_]*.py")}
    for name in ("gemma2", "../llama", "family", "__init__", None, ["llama"]):
        with pytest.raises(ConfigError, match=r"is not supported; supported are afmoe, axk1, "):
            family(name)


@pytest.mark.parametrize("path", sorted(FAMILIES.glob("*.py")), ids=lambda path: path.stem)
def test_a_family_is_a_short_file(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 80


def test_no_other_file_names_a_family() -> None:
    """Families may build on each other; whoever adds one touches nothing else."""
    import ast

    naming = [
        (path.relative_to(SOURCE), name)
        for path in FILES
        if path.parent != FAMILIES and "moebius.models.families" in path.read_text()
        for name in imported(ast.parse(path.read_text()))
        if name.startswith("moebius.models.families.")
    ]
    assert naming == []
