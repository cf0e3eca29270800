"""Kimi-K2: a DeepSeek-V3 of other sizes, by a name of its own."""

from dataclasses import replace
from pathlib import Path

from moebius.models.families import deepseek_v3
from moebius.models.gguf_latent import LIKE_V3
from moebius.models.reading import Keys

KEYS = Keys.of_file(Path(deepseek_v3.__file__).with_suffix(".json"))
FAMILY = replace(deepseek_v3.FAMILY, keys=KEYS, gguf=(LIKE_V3,))
