"""Gemma 4 with images, of which the language model is read."""

from moebius.models.family import Nested

FAMILY = Nested("gemma4_text")
