"""Options that several commands share: one definition each, one way into an EngineConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from moebius.config import EngineConfig

Model = Annotated[str, typer.Argument(help="A directory in the Hugging Face layout, a hub id, or 'bundled'.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="A directory in the Hugging Face layout, a hub id, or 'bundled'.")
]
Dtype = Annotated[str, typer.Option(help="Of weights and KV cache: auto, bfloat16 or float32.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest sequence, prompt and output together, in tokens.")]
MaxNumSeqs = Annotated[int, typer.Option(help="Most sequences in one step.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(help="Token budget of one step.")]
BlockSize = Annotated[int, typer.Option(help="Tokens in one block of the KV cache.")]
KVCacheMemoryBytes = Annotated[
    int | None, typer.Option(help="What the KV cache reserves; default: see `moebius plan`.")
]
PrefixCaching = Annotated[bool, typer.Option(help="Share blocks between requests with a common prefix.")]
ChunkedPrefill = Annotated[bool, typer.Option(help="Compute long prompts in pieces beside running decodes.")]
Threads = Annotated[int | None, typer.Option(help="Compute threads; default: one a core.")]
Trace = Annotated[
    str | None, typer.Option(metavar="FILE", help="Write every scheduling decision to FILE (JSON lines).")
]

DEFAULTS = EngineConfig()


def engine_config(given: Mapping[str, Any]) -> EngineConfig:
    """An EngineConfig from a command's options (its `locals()`): they carry the same names, others are left out."""
    return EngineConfig(**{name: given[name] for name in EngineConfig.__dataclass_fields__ if name in given})
