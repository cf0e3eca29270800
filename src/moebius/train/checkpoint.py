"""The state of a training run as one safetensors file: tensors, and JSON in its header. Nothing is ever unpickled."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moebius.errors import WeightsError
from moebius.models.weights import publish


@dataclass(frozen=True)
class TrainingState:
    """Everything that the next step depends on. `step` counts the steps that are done; `facts` is plain JSON."""

    step: int
    fingerprint: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_state(state: TrainingState, path: Path) -> None:
    """Write the file so that `path` holds either the old state or the new one, whenever the machine stops."""
    partial = path.with_suffix(".partial")
    header = {"step": state.step, "fingerprint": state.fingerprint, "facts": state.facts}
    save_file(state.tensors, partial, metadata={"moebius": json.dumps(header)})
    publish(partial, path)


def load_state(path: Path) -> TrainingState:
    """Raises: WeightsError, when the file is missing, truncated or no training state."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["moebius"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return TrainingState(header["step"], header["fingerprint"], tensors, header["facts"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} is no training checkpoint: {error}") from None
