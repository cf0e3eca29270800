"""Gemma 3 with images, of which the language model is read."""

from moebius.models.family import Nested

FAMILY = Nested("gemma3_text")
