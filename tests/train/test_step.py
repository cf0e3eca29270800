from __future__ import annotations

import pytest
import torch

from moebius.moe.router import Routing
from moebius.train.step import Losses, StepSums


def routing(chosen: list[list[int]], kept: list[list[bool]] | None = None) -> Routing:
    ids_TK = torch.tensor(chosen)
    weights_TK = torch.ones(ids_TK.shape)
    kept_TK = None if kept is None else torch.tensor(kept)
    return Routing(weights_TK, ids_TK, torch.zeros(len(chosen), 3), kept_TK)


def losses(*values: float) -> Losses:
    return Losses(*(torch.tensor(value, requires_grad=True) for value in values))


def test_two_micro_batches_are_the_mean_of_their_losses_and_the_sum_of_their_counts() -> None:
    sums = StepSums(2, 3, torch.device("cpu"))
    first = [routing([[0, 1], [0, 2]]), routing([[1, 2], [1, 2]], [[True, True], [False, True]])]
    second = [routing([[2, 1], [2, 0]]), routing([[0, 1], [0, 1]], [[False, True], [False, True]])]
    sums.add(losses(2.0, 1.0, 0.5), first, 2)
    sums.add(losses(4.0, 3.0, 1.5), second, 2)
    report = sums.report(torch.tensor(7.0), 0.1)
    assert (report.loss, report.balance, report.z) == (3.0, 2.0, 1.0)
    assert (report.grad_norm, report.learning_rate) == (7.0, 0.1)
    assert report.counts.tolist() == [[3, 2, 3], [2, 4, 2]]
    # A quarter of the first and a half of the second micro-batch's choices found no room.
    assert report.dropped.tolist() == [0.0, 0.375]


def test_ranks_add_up_the_one_vector_and_every_part_follows() -> None:
    sums = StepSums(1, 3, torch.device("cpu"))
    sums.add(losses(2.0, 1.0, 0.5), [routing([[0, 2]], [[True, False]])], 1)
    sums.vector *= 2
    report = sums.report(torch.tensor(0.0), 0.0)
    assert (report.loss, report.balance, report.z) == (4.0, 2.0, 1.0)
    assert report.dropped.tolist() == [1.0]
    assert report.counts.tolist() == [[2, 0, 2]]


def test_a_dense_model_has_losses_alone() -> None:
    sums = StepSums(0, 0, torch.device("cpu"))
    sums.add(losses(2.5, 0.0, 0.0), [], 1)
    report = sums.report(torch.tensor(1.0), 1.0)
    assert report.loss == pytest.approx(2.5)
    assert report.counts.numel() == report.dropped.numel() == 0


@pytest.mark.parametrize("bad", ["loss", "norm"])
def test_what_is_no_number_is_told(bad: str) -> None:
    sums = StepSums(0, 0, torch.device("cpu"))
    assert sums.report(torch.tensor(1.0), 0.1).finite
    sums.add(losses(float("nan") if bad == "loss" else 1.0, 0.0, 0.0), [], 1)
    norm = torch.tensor(float("inf") if bad == "norm" else 1.0)
    assert not sums.report(norm, 0.1).finite
