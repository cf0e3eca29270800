"""What all tests share: one compute thread, and a tiny model saved once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny float32 qwen3_moe and its tokenizer."""
    from tiny import write_model

    directory = tmp_path_factory.mktemp("tiny")
    write_model(directory)
    return directory
