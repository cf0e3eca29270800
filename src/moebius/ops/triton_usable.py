"""Whether a CUDA device can be served by kernels in Triton. Triton itself is imported last."""

import importlib.metadata
import re

import torch

LEAST_TRITON = (3, 6)
"""The first version whose language and interpreter these kernels were written for."""
LEAST_CAPABILITY = (8, 0)
"""Ampere: the first with bfloat16 products and asynchronous copies."""


def why_not(device: torch.device | None) -> str:
    """Why kernels in Triton cannot serve `device`, in a line; empty where they can. None: some
    device that is not here."""
    reason = (device is not None and _of_card(device)) or _of_triton()
    if reason:
        return reason
    try:
        import triton  # noqa: F401
    except Exception as error:  # a half-installed one fails in many ways
        return f"triton cannot be imported: {' '.join(str(error).split())}"
    return ""


def _of_card(device: torch.device) -> str:
    found = torch.cuda.get_device_capability(device)
    if found >= LEAST_CAPABILITY:
        return ""
    name = torch.cuda.get_device_name(device)
    return (
        f"{name} has compute capability {_dotted(found)}; kernels need {_dotted(LEAST_CAPABILITY)} "
        "(Ampere) or newer"
    )


def _of_triton() -> str:
    least = _dotted(LEAST_TRITON)
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return f"triton is not installed; pip install 'triton>={least}'"
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < LEAST_TRITON:
        return f"triton {version} is too old; pip install 'triton>={least}'"
    return ""


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
