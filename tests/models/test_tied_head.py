"""Whether the head is the embedding: what the file holds counts for more than config.json, as in
transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from covering import each_value
from moebius.errors import WeightsError
from moebius.models.family import family
from moebius.models.store import fingerprint, open_checkpoint
from moebius.models.store.load import load_decoder
from moebius.models.store.save import save_checkpoint
from oracle import FAMILY, ONE_OF_EACH_KIND, Server, assert_close, load_theirs, save_tiny

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROMPT = [5, 66, 0, 17, 23, 23, 41, 8]
# transformers ties nothing of these, whatever config.json says.
NEVER_TIED = {"kimi_linear", "bailing_hybrid", "nemotron_h"}
MAY_BE_TIED = [model_type for model_type in FAMILY if model_type not in NEVER_TIED]
Heads = dict[str, Callable[[Tensor], dict[str, Tensor]]]

# What a file holds of an embedding and a head, from the embedding that was saved; and whether the
# two are one.
APART: Heads = {
    "another": lambda embedding: {EMBEDDING: embedding, HEAD: embedding.flip(0).contiguous()},
    "one-number": lambda embedding: {
        EMBEDDING: embedding,
        HEAD: torch.cat((embedding[:-1], embedding[-1:] + 1)),
    },
}
ONE: Heads = {
    "copy": lambda embedding: {EMBEDDING: embedding, HEAD: embedding.clone()},
    "embedding-alone": lambda embedding: {EMBEDDING: embedding},
    "head-alone": lambda embedding: {HEAD: embedding},
}


def tied(directory: Path, model_type: str, heads: Callable[[Tensor], dict[str, Tensor]]) -> None:
    """A tiny model whose config.json says tie_word_embeddings, and whose file holds what `heads`
    says."""
    save_tiny(directory, model_type, tie_word_embeddings=True)
    tensors = load_file(directory / "model.safetensors")
    (name,) = {layout.embedding for layout in family(model_type).layouts} & tensors.keys()
    for each, tensor in heads(tensors.pop(name)).items():
        tensors[name if each == EMBEDDING else each] = tensor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def assert_as_transformers(directory: Path) -> None:
    with torch.inference_mode():
        theirs = load_theirs(directory)(torch.tensor([PROMPT])).logits[0]
    server = Server(load_decoder(directory, torch.float32), block_size=4, num_blocks=4)
    server.step([(0, PROMPT)])
    assert_close(server.all_logits(0), theirs)


@pytest.mark.case("A1")
@pytest.mark.parametrize(("model_type", "heads"), each_value(FAMILY, APART, among=ONE_OF_EACH_KIND))
def test_a_head_that_differs_is_used(
    tmp_path: Path,
    model_type: str,
    heads: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tied(tmp_path, model_type, APART[heads])
    assert_as_transformers(tmp_path)
    assert [r.levelno for r in caplog.records if "tie_word_embeddings" in r.getMessage()] == [
        logging.WARNING
    ]
    rows = {row.name: row for row in open_checkpoint(tmp_path).plan_weights("float32")}
    assert (
        rows["lm_head.weight"].mapped
        and rows["lm_head.weight"].nbytes == rows["embed_tokens.weight"].nbytes
    )


@pytest.mark.case("A1")
@pytest.mark.parametrize(
    ("model_type", "heads"), each_value(MAY_BE_TIED, ONE, among=ONE_OF_EACH_KIND)
)
def test_one_tensor_serves_as_both(
    tmp_path: Path,
    model_type: str,
    heads: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tied(tmp_path, model_type, ONE[heads])
    assert_as_transformers(tmp_path)
    assert not [record for record in caplog.records if "tie_word_embeddings" in record.getMessage()]
    assert "lm_head.weight" not in {
        row.name for row in open_checkpoint(tmp_path).plan_weights("float32")
    }


@pytest.mark.case("A1")
def test_a_copy_of_another_dtype_is_no_copy(tmp_path: Path) -> None:
    """In float32 the two differ; a head of its own is right in any dtype."""
    tied(tmp_path, "llama", lambda embedding: {EMBEDDING: embedding, HEAD: embedding.bfloat16()})
    assert_as_transformers(tmp_path)
    assert not open_checkpoint(tmp_path).config.tie_word_embeddings


@pytest.mark.case("A1")
def test_heads_are_compared_to_their_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces that do not divide them, over two files; the fingerprint, which takes samples,
    tells them apart."""
    monkeypatch.setattr("moebius.models.store.checkpoint._COMPARED_AT_ONCE", 1000)
    found = {}
    for name, heads in (("copy", ONE["copy"]), ("one-number", APART["one-number"])):
        directory = tmp_path / name
        tied(directory, "qwen2", heads)
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        files = {"a.safetensors": {HEAD: tensors.pop(HEAD)}, "b.safetensors": tensors}
        for file, part in files.items():
            save_file(part, directory / file)
        weight_map = {tensor: file for file, part in files.items() for tensor in part}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
        checkpoint = open_checkpoint(directory)
        found[checkpoint.config.tie_word_embeddings] = fingerprint(checkpoint)
    assert found.keys() == {True, False} and found[True] != found[False]


@pytest.mark.case("A1")
def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    tied(tmp_path, "llama", lambda embedding: {EMBEDDING: embedding, HEAD: embedding[:-1].clone()})
    with pytest.raises(WeightsError, match=r"lm_head\.weight.* has shape \[66, 24\]"):
        open_checkpoint(tmp_path)


@pytest.mark.case("A1")
def test_no_head_where_one_is_needed_says_which_key_to_set(tmp_path: Path) -> None:
    tied(tmp_path, "llama", ONE["embedding-alone"])
    raw = json.loads((tmp_path / "config.json").read_text())
    for changed in (
        {**raw, "tie_word_embeddings": False},
        {k: v for k, v in raw.items() if "tie" not in k},
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(
            WeightsError, match=r"'lm_head.weight' is missing; .* tie_word_embeddings = true"
        ):
            open_checkpoint(tmp_path)


@pytest.mark.case("A1")
@pytest.mark.parametrize("heads", [APART["another"], *ONE.values()], ids=["another", *ONE])
def test_what_is_saved_is_what_was_loaded(
    tmp_path: Path, heads: Callable[[Tensor], dict[str, Tensor]]
) -> None:
    tied(tmp_path / "model", "qwen3", heads)
    checkpoint = open_checkpoint(tmp_path / "model")
    decoder = load_decoder(checkpoint, torch.float32)
    save_checkpoint(decoder, checkpoint.config_json, tmp_path / "saved")
    assert_as_transformers(tmp_path / "saved")
    again = load_decoder(tmp_path / "saved", torch.float32)
    for (name, mine), (_, stored) in zip(
        decoder.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(mine, stored), name
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    assert stored == checkpoint.config.tie_word_embeddings == (heads is not APART["another"])


@pytest.mark.case("A1")
# Ling 3's names without what stands before them are none that transformers knows.
@pytest.mark.parametrize(
    ("model_type", "head"),
    each_value(
        [each for each in FAMILY if each != "bailing_hybrid"],
        [True, False],
        among=ONE_OF_EACH_KIND,
    ),
)
def test_a_model_that_was_saved_without_a_head_has_shorter_names(
    tmp_path: Path, model_type: str, head: bool
) -> None:
    save_tiny(tmp_path, model_type, tie_word_embeddings=not head)
    tensors = load_file(tmp_path / "model.safetensors")
    shorter = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(shorter, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert (HEAD in shorter) == (head or model_type in NEVER_TIED)
    assert_as_transformers(tmp_path)
