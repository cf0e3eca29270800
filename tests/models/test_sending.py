"""Weights on their way from a file to a device, which other memory of the host stands for."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moebius.models.store import load as loading
from moebius.models.store import open_checkpoint
from moebius.models.store.load import Loader, load_decoder
from moebius.models.store.mapped import MappedFiles
from moebius.models.store.sending import Sender, Staging
from moebius.ops.reference import ReferenceOps
from oracle import save_tiny

STAGED = 2**20


class Late(Staging):
    """A device that copies when it is waited for, or when it is closed: what is written to a buffer
    before that arrives in its place. Its memory is shared, which the system counts apart."""

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Tensor]] = []
        self.pieces: list[int] = []
        self.buffers = 0

    def pinned(self, nbytes: int) -> Tensor:
        self.buffers += 1
        return torch.zeros(nbytes, dtype=torch.uint8)

    def empty(self, nbytes: int) -> Tensor:
        return torch.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=torch.uint8)[:nbytes]

    def send(self, host: Tensor, there: Tensor) -> Callable[[], None]:
        self.pieces.append(len(host))
        self.pending.append((host, there))
        assert len(self.pending) <= 2, "a third piece, where there are two buffers"
        mine = self.pending[-1]

        def wait() -> None:
            while any(mine is each for each in self.pending):
                host, there = self.pending.pop(0)
                there.copy_(host)

        return wait


class InOrder(Late):
    """What is asked of the device next comes after what was sent."""

    def send(self, host: Tensor, there: Tensor) -> Callable[[], None]:
        super().send(host, there)()
        return lambda: None


def test_pieces_arrive_whole_and_in_order() -> None:
    device = Late()
    send = Sender(device, staged_bytes=1000)
    sent = {}
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int64):
        for shape in ((0,), (1,), (7, 11), (333, 5)):
            x = torch.randint(0, 100, shape).to(dtype)
            sent[dtype, shape] = (x.clone(), send(x))
    x = torch.arange(600).view(20, 30).t()
    sent[x.dtype, "transposed"] = (x.clone(), send(x))
    send.finish()
    for what, (wanted, found) in sent.items():
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), what
    assert max(device.pieces) == 1000 and device.buffers == 2


def test_threads_share_the_two_buffers() -> None:
    send = Sender(Late(), staged_bytes=512)
    wanted = [torch.randn(50 + i) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: send(x.clone()), wanted))
    send.finish()
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def test_a_model_is_loaded_through_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is copied on the host: another dtype than the file's, and stacked experts. All
    that was sent is given back."""
    save_tiny(tmp_path, "gpt_oss")
    device = InOrder()
    monkeypatch.setattr(loading, "sender_to", lambda _: Sender(device, staged_bytes=4096))
    released: set[int] = set()

    def release(_: MappedFiles, file: Path, spans: Iterable[tuple[int, int]]) -> None:
        for span in spans:
            released.update(range(*span))

    monkeypatch.setattr(MappedFiles, "release", release)
    ops = ReferenceOps()
    checkpoint = open_checkpoint(tmp_path)
    decoder = loading.decoder_of(checkpoint.config, ops, torch.bfloat16, device="meta")
    Loader(checkpoint, torch.device("cpu")).fill(decoder)
    monkeypatch.undo()
    wanted = load_decoder(tmp_path, torch.bfloat16, ops=ops)
    assert device.pieces
    planned = checkpoint.plan_weights("bfloat16", "cpu", ops.formats(torch.bfloat16))
    sent = {
        source.name
        for source, plan in zip(checkpoint.sources, planned, strict=True)
        if not plan.mapped
    }
    assert len(sent) > 5
    planes = [plane for name in sent for plane in checkpoint.tensors[name].planes]
    assert released == {byte for plane in planes for byte in range(plane.start, plane.stop)}
    pairs = zip(decoder.state_dict().items(), wanted.state_dict().values(), strict=True)
    for (name, one), other in pairs:
        assert torch.equal(one, other), name
