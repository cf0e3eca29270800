"""Model directories: their configuration, their tensors, and the decoder. Nothing imported here
imports torch."""

from moebius.models.families import MODEL_TYPES, checkpoint_layouts, model_config, read_config

__all__ = ["MODEL_TYPES", "checkpoint_layouts", "model_config", "read_config"]
