"""A decoder's weights into a model directory: model.safetensors and config.json."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moebius.files import anyone, json_text, make_directory, write_file
from moebius.models.decoder import Decoder
from moebius.models.family import family, model_config
from moebius.models.layout import Source, sources
from moebius.models.quantization.read import KEYS as QUANTIZATION_KEYS
from moebius.models.store.heads import of_heads


def _stored_tensors(
    state: Mapping[str, Tensor], wanted: Iterator[Source], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The checkpoint's tensors, stacked where its layout stacks."""
    tensors: dict[str, Tensor] = {}
    for source in wanted:
        kept = torch.float32 if source.float32 else dtype
        value = state[source.parameter].detach().to(device="cpu", dtype=kept).contiguous()
        if source.added:
            value = value - source.added
        if source.stored_shape == source.shape:
            tensors[source.name] = value
            continue
        whole = tensors.setdefault(source.name, torch.empty(source.stored_shape, dtype=kept))
        if source.heads:
            part = of_heads(whole, source)
            part.copy_(value.view(part.shape))
            continue
        entry = whole if source.entry is None else whole[source.entry]
        if len(entry.shape) > len(source.shape):
            entry = entry[0]
        (entry.t() if source.transposed else entry)[slice(*source.rows)] = value
    return tensors


def save_checkpoint(
    model: Decoder | Mapping[str, Tensor],
    config_json: Mapping[str, Any],
    directory: Path | str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write model.safetensors and config.json in the published layout of config_json's model_type.

    model is a decoder or its state dict; dtype None keeps the embedding's, and is written into
    config.json, as is whether the head is the embedding, where config_json says otherwise. Each
    file is complete or as it was before. Raises StorageError.
    """
    directory = Path(directory)
    make_directory(directory)
    state = model.state_dict() if isinstance(model, Decoder) else model
    dtype = dtype or state["embed_tokens.weight"].dtype
    config = model_config(config_json)
    tied = "lm_head.weight" not in state
    if config.tie_word_embeddings != tied:
        config = replace(config, tie_word_embeddings=tied)
        config_json = {**config_json, "tie_word_embeddings": tied}
    wanted = sources(config, family(config.model_type).layouts[0])
    tensors = _stored_tensors(state, wanted, dtype)
    weights = directory / "model.safetensors"
    write_file(weights, lambda to: save_file(tensors, to, metadata={"format": "pt"}), ours=anyone)
    # transformers 5 calls it dtype, and reads the name of old too, which is the only one that
    # version 4 reads.
    gone = {"dtype", *QUANTIZATION_KEYS}  # what is written is plain numbers
    described = {key: value for key, value in config_json.items() if key not in gone}
    described["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_file(
        directory / "config.json",
        json_text(described, indent=2, sort_keys=True) + "\n",
        ours=anyone,
    )
