"""Rotary embeddings of tiny models, as config.json scales them."""

from __future__ import annotations

from typing import Any

LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
