"""Gemma 4 12B, which reads images and sounds without towers of their own: its language model."""

from moebius.models.family import Nested

FAMILY = Nested("gemma4_unified_text")
