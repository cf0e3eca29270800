"""GLM-5 where it is DeepSeek-V3: as deepseek_v32, with an indexer that layers may share."""

from dataclasses import replace

from moebius.models.config import ModelConfig
from moebius.models.families import deepseek_v32
from moebius.models.reading import ConfigReader

SHARING = {"indexer_types", "index_topk_freq", "index_topk_pattern", "index_skip_topk_offset"}


def read(reader: ConfigReader) -> ModelConfig:
    reader.computed |= SHARING
    return deepseek_v32.read(reader)


FAMILY = replace(deepseek_v32.FAMILY, read=read)
