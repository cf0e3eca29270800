"""Weights in and out: safetensors files to a Decoder, mapped without a copy where the dtype allows, and back."""

import math
import mmap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from moebius.config import json_text
from moebius.errors import WeightsError
from moebius.files import anyone, make_directory, write_file
from moebius.models import checkpoint_layouts, model_config
from moebius.models.checkpoint import Checkpoint, StoredTensor, open_checkpoint
from moebius.models.decoder import Decoder
from moebius.models.layout import Source, sources
from moebius.ops import Ops, select_ops
from moebius.pages import populate

_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class _Files:
    """Read-only maps of a checkpoint's files. A map lives as long as a tensor over it."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def view(self, source: Source, stored: StoredTensor) -> Tensor:
        """The source's values where they lie in the file, in the file's dtype."""
        if stored.file not in self._maps:
            with stored.file.open("rb") as file:
                region = self._maps[stored.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # What is read from now on is read ahead, and in huge pages where the kernel has them for files.
            for advice in ("MADV_HUGEPAGE", "MADV_WILLNEED"):
                with suppress(OSError, AttributeError):
                    region.madvise(getattr(mmap, advice))
            populate(np.frombuffer(region, np.uint8).ctypes.data, len(region), write=False, keep=region)
        dtype = _TORCH_DTYPES[stored.dtype]
        count = math.prod(source.shape)
        row = math.prod(source.stored_shape[2:])
        skipped = 0 if source.entry is None else (source.entry * source.stored_shape[1] + source.start) * row
        start = stored.start + skipped * dtype.itemsize
        region = self._maps[stored.file]
        if len(region) < stored.stop:
            raise WeightsError(f"{stored.file} shrank while it was loaded")
        aligned = start % dtype.itemsize == 0
        values = region if aligned else bytearray(region[start : start + count * dtype.itemsize])
        return torch.frombuffer(values, dtype=dtype, count=count, offset=start if aligned else 0).view(source.shape)


def load_decoder(
    checkpoint: Checkpoint | Path | str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    ops: Ops | None = None,
    *,
    mapped: bool = True,
) -> Decoder:
    """A decoder with a checkpoint's weights as `dtype` on `device`.

    On a CPU, tensors that are stored as `dtype` are used where they lie in the mapped file: loading copies nothing and
    processes share the pages. Such weights cannot be written and take no gradient; mapped=False copies all of them for
    training. Raises ConfigError or WeightsError before anything is allocated.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    device = torch.device(device)
    decoder = Decoder(checkpoint.config, ops or select_ops(device, dtype), dtype, device="meta")
    _check_all_have_a_source(decoder, checkpoint.sources)
    files, modules = _Files(), dict(decoder.named_modules())
    with warnings.catch_warnings():
        # torch warns that the buffer cannot be written; nothing here writes to weights.
        warnings.simplefilter("ignore")
        for source in checkpoint.sources:
            value = files.view(source, checkpoint.tensors[source.name])
            value = value.to(device=device, dtype=torch.float32 if source.float32 else dtype, copy=not mapped)
            module, _, leaf = source.parameter.rpartition(".")
            modules[module].register_parameter(leaf, nn.Parameter(value, requires_grad=not mapped))
    return decoder


def _check_all_have_a_source(decoder: Decoder, sources: Iterable[Source]) -> None:
    """Raises WeightsError naming what would stay without values: nothing but a source takes a tensor off meta."""
    tensors = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}
    found = {source.parameter: source.shape for source in sources}
    bare = [name for name, tensor in tensors.items() if tensor.is_meta and found.get(name) != tuple(tensor.shape)]
    if bare:
        more = f" (and {len(bare) - 1} more)" if len(bare) > 1 else ""
        raise WeightsError(
            f"no tensor of a {decoder.config.model_type} checkpoint holds the values of {bare[0]}{more}; "
            "what config.json describes cannot be loaded"
        )


def _stored_tensors(state: Mapping[str, Tensor], wanted: Iterator[Source], dtype: torch.dtype) -> dict[str, Tensor]:
    """The checkpoint's tensors, stacked where its layout stacks."""
    tensors: dict[str, Tensor] = {}
    for source in wanted:
        kept = torch.float32 if source.float32 else dtype
        value = state[source.parameter].detach().to(device="cpu", dtype=kept).contiguous()
        if source.entry is None:
            tensors[source.name] = value
            continue
        stacked = tensors.setdefault(source.name, torch.empty(source.stored_shape, dtype=dtype))
        stacked[source.entry, source.start : source.start + source.shape[0]] = value
    return tensors


def save_checkpoint(
    model: Decoder | Mapping[str, Tensor],
    config_json: Mapping[str, Any],
    directory: Path | str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write model.safetensors and config.json in the published layout of config_json's model_type.

    model is a decoder or its state dict; dtype None keeps the embedding's, and is written into config.json, as is
    whether the head is the embedding, where config_json says otherwise. Each file is complete or as it was before.
    Raises StorageError.
    """
    directory = Path(directory)
    make_directory(directory)
    state = model.state_dict() if isinstance(model, Decoder) else model
    dtype = dtype or state["embed_tokens.weight"].dtype
    config, tied = model_config(config_json), "lm_head.weight" not in state
    if config.tie_word_embeddings != tied:
        config, config_json = replace(config, tie_word_embeddings=tied), {**config_json, "tie_word_embeddings": tied}
    wanted = sources(config, checkpoint_layouts(config.model_type)[0])
    tensors = _stored_tensors(state, wanted, dtype)
    weights = directory / "model.safetensors"
    write_file(weights, lambda to: save_file(tensors, to, metadata={"format": "pt"}), ours=anyone)
    # transformers 5 calls it dtype, and reads the name of old too, which is the only one that version 4 reads.
    described = {key: value for key, value in config_json.items() if key != "dtype"}
    described["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_file(directory / "config.json", json_text(described, indent=2, sort_keys=True) + "\n", ours=anyone)
