from __future__ import annotations

from copy import deepcopy

import torch

from moebius.train.masters import Masters, squared_norm
from moebius.train.tables import TrainingRecipe

TRAINING = TrainingRecipe(
    steps=10, rows_per_step=1, row_length=2, learning_rate=0.1, warmup_steps=0, weight_decay=0.5
)
INITIAL = {
    "matrix": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
    "gain": torch.tensor([1.0, 1.0]),
    "frozen": torch.tensor([[5.0]]),
}
CPU = torch.device("cpu")


def masters() -> Masters:
    copies = {
        name: torch.nn.Parameter(torch.zeros_like(x, dtype=torch.bfloat16), name != "frozen")
        for name, x in INITIAL.items()
    }
    return Masters(copies, {name: x.clone() for name, x in INITIAL.items()}, TRAINING, CPU)


def test_copies_are_the_masters_rounded() -> None:
    made = masters()
    for name, copy in made.copies.items():
        assert torch.equal(copy, INITIAL[name].bfloat16())


def test_an_update_is_adamw_by_hand_and_leaves_the_frozen_alone() -> None:
    """The first step moves every weight by the rate, against its gradient's sign; matrices decay
    by rate * weight_decay beforehand."""
    made = masters()
    made.gradient.copy_(torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0, -6.0]))
    made.update(0.1)
    found = made.state()
    sign = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
    torch.testing.assert_close(found["master"]["matrix"], INITIAL["matrix"] * 0.95 - 0.1 * sign)
    torch.testing.assert_close(found["master"]["gain"], torch.tensor([0.9, 1.1]))
    assert torch.equal(found["master"]["frozen"], INITIAL["frozen"])
    moments = {"matrix", "gain"}
    assert {kind: set(tensors) for kind, tensors in found.items()} == {
        "master": {*INITIAL},
        "mean": moments,
        "square": moments,
    }


def test_gradients_of_several_passes_add_up_and_are_taken_away_from_the_copies() -> None:
    made = masters()
    for _ in range(2):
        made.copies["matrix"].grad = torch.full((2, 2), 0.5, dtype=torch.bfloat16)
        made.take_gradients()
    assert made.copies["matrix"].grad is None
    assert made.gradient.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_restored_one_goes_on_as_the_first_would() -> None:
    first = masters()
    first.gradient.copy_(torch.arange(6.0))
    first.update(0.1)
    first.round()
    second = masters()
    second.restore(deepcopy(first.state()), 1)
    for made in (first, second):
        made.gradient.copy_(-(torch.arange(6.0) ** 2))
        made.update(0.05)
    for kind, tensors in first.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(second.state()[kind][name], tensor), (kind, name)
    assert torch.equal(second.copies["gain"], first.copies["gain"])


def test_the_first_broken_gradient_is_the_one_nearest_to_the_loss() -> None:
    made = masters()
    made.gradient.copy_(torch.tensor([float("nan"), 0.0, 0.0, 0.0, float("inf"), 0.0]))
    assert made.broken_gradients() == ["gain", "matrix"]


def test_the_norm_of_a_gradient_is_exact_where_float32_sums_are_not() -> None:
    """Blocks, and what is left of them, against double precision; of nothing it is 0."""
    vector = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0)) + 1
    exact = vector.double().square().sum()
    assert abs(squared_norm(vector) / exact - 1) < 1e-6
    assert squared_norm(vector[:5]) == vector[:5].norm().double().square()
    assert squared_norm(vector[:0]) == 0


def test_gradients_of_weights_that_are_here_alone_stand_apart() -> None:
    """Those that all ranks have come first, and alone are what ranks compare."""
    copies = {name: torch.nn.Parameter(torch.zeros_like(x)) for name, x in INITIAL.items()}

    def made(initial: dict[str, torch.Tensor]) -> Masters:
        whole = {name: x.clone() for name, x in initial.items()}
        return Masters(copies, whole, TRAINING, CPU, own=lambda name: name == "matrix")

    first = made(INITIAL)
    assert (len(first.shared_gradient), len(first.own_gradient)) == (3, 4)
    other = made(INITIAL | {"matrix": torch.zeros(2, 2)})
    assert other.digest() == first.digest()
    assert made(INITIAL | {"gain": torch.tensor([1.0, 1.5])}).digest() != first.digest()
