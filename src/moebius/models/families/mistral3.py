"""Mistral Small 4 with images, of which the language model alone is read."""

from moebius.models.family import Nested

FAMILY = Nested("mistral4")
