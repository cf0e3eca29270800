"""The language model of gemma4_unified: Gemma 4, dense."""

from moebius.models.families import gemma4_text
from moebius.models.family import Family
from moebius.models.gguf_gemma4 import GGUF

FAMILY = Family(gemma4_text.read, gemma4_text.LAYOUTS, gemma4_text.UNUSED, gguf=(GGUF,))
