"""What captures on a CUDA device, by torch.cuda's own rules: nothing that fails there may hold the
device, or be told as something else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gpu_kernels.conftest import DEVICE
from gpu_kernels.device_tensor import CARD
from gpu_kernels.fake_cuda import FakeCuda
from moebius.ops.triton.card import CudaCard, NotCaptured, ended_capture

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="a fake stands in the card's place")


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as cuda:
        yield cuda


def captured(card: CudaCard, work: Callable[[], None]) -> Callable[[], None]:
    with card.beside():
        work()
    with card.beside():
        card.begin()
        work()
        return card.end()


def test_what_is_captured_is_done_again(cuda: FakeCuda) -> None:
    card = CudaCard(CARD)
    x = torch.zeros(3, device=CARD)

    def work() -> None:
        x.add_(torch.ones_like(x) + 1)

    replay = captured(card, work)
    assert x.tolist() == [2.0] * 3  # once as it is; to be noted is not to be done
    replay()
    assert x.tolist() == [4.0] * 3


def test_work_that_gives_up_ends_its_capture(cuda: FakeCuda) -> None:
    """The reason is told, and the same card captures the next."""
    card = CudaCard(CARD)
    x = torch.zeros(3, device=CARD)
    with pytest.raises(NotCaptured, match="the reason"), card.beside():
        card.begin()
        x.add_(1)
        raise NotCaptured("the reason")
    assert cuda.capture is None
    torch.cuda.synchronize()
    captured(card, lambda: x.add_(1))()
    assert x.tolist() == [2.0] * 3


def of_a_value(x: Tensor) -> object:
    return x.sum().item()


def of_the_host(x: Tensor) -> object:
    return x.add_(torch.ones(3).to(CARD))


def of_the_end(x: Tensor) -> object:
    return torch.cuda.synchronize()


@pytest.mark.parametrize("wrong", [of_a_value, of_the_host, of_the_end])
def test_a_capture_that_cuda_ends_holds_nothing(
    cuda: FakeCuda, wrong: Callable[[Tensor], object]
) -> None:
    card = CudaCard(CARD)
    x = torch.zeros(3, device=CARD)
    with pytest.raises(torch.AcceleratorError) as told, card.beside():
        card.begin()
        wrong(x)
        card.end()
    assert ended_capture(told.value)
    assert cuda.capture is None and not cuda.broken_pools and not cuda.held_pools
    captured(card, lambda: x.add_(1))


def test_a_capture_that_was_broken_unnoticed_fails_where_it_ends(cuda: FakeCuda) -> None:
    card = CudaCard(CARD)
    x = torch.zeros(3, device=CARD)
    with pytest.raises(torch.AcceleratorError, match="previous error") as told, card.beside():
        card.begin()
        with pytest.raises(torch.AcceleratorError):
            of_a_value(x)
        card.end()
    assert ended_capture(told.value)
    assert cuda.capture is None and not cuda.broken_pools and not cuda.held_pools
    captured(card, lambda: x.add_(1))
