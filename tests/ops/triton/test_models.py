"""A model whose operations are Triton's, as far as there are kernels, beside plain PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moebius.models.store.load import load_decoder
from moebius.ops.interface import Ops
from moebius.ops.reference import ReferenceOps
from moebius.ops.triton import TritonOps
from ops.triton.conftest import DEVICE
from oracle import Server


@torch.inference_mode()
def logits(directory: Path, ops: Ops) -> Tensor:
    """Of a prompt in two chunks, of which the second is a decode."""
    decoder = load_decoder(directory, torch.float32, DEVICE, ops)
    server = Server(decoder, block_size=4, num_blocks=4)
    for chunk in ([3, 1, 4, 1], [5]):
        server.step([(0, chunk)])
    return server.all_logits(0)


def test_a_mixture_of_experts(tiny_model: Path) -> None:
    found = logits(tiny_model, TritonOps())
    torch.testing.assert_close(found, logits(tiny_model, ReferenceOps()), rtol=1e-5, atol=1e-5)
