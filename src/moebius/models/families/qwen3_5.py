"""Qwen3.5, dense, with images, of which the language model is read."""

from moebius.models.family import Nested

FAMILY = Nested("qwen3_5_text")
