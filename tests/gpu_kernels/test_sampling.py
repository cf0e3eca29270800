"""From logits to tokens in Triton, beside loops and plain PyTorch: parts of rows are so short here
that small vocabularies have several."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpu_kernels.compiling import assert_compile, launches
from gpu_kernels.conftest import DEVICE
from gpu_kernels.standing_in import inside_interpreter
from moebius.engine import sampler
from moebius.ops.draws import Draw
from moebius.ops.reference import ReferenceOps
from moebius.ops.sampling import ALL_BANNED, LOWEST, NOT_FINITE, UNDECIDED, Shaping
from moebius.ops.triton import TritonOps
from moebius.ops.triton import sampling as triton_sampling
from moebius.ops.triton.kernels import sampling as kernels
from moebius.request.engine_request import EngineRequest
from moebius.request.params import SamplingParams, ServingLimits
from moebius.schedule.request import Request

OPS = TritonOps()
REF = ReferenceOps()
VOCABS = [1, 16, 33, 100]


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_sampling, "_PART", 16)
    return None


def tied(rows: int, vocab: int) -> Tensor:
    """Logits some of which are equal, and zeros of both signs."""
    logits = torch.randn(rows, vocab, device=DEVICE)
    logits[:, ::2] = logits[:, ::2].round()
    return logits


def first_of_largest(x: list[float]) -> int:
    return x.index(max(x))


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("vocab", VOCABS)
def test_argmax(vocab: int) -> None:
    logits = tied(4, vocab)
    logits[0] = 1.0
    expected = [first_of_largest(row) for row in logits.tolist()]
    assert OPS.argmax(logits) == expected
    assert OPS.argmax(logits, [3, 1, 3]) == [expected[row] for row in (3, 1, 3)]
    assert OPS.argmax(logits, []) == [] and OPS.argmax(logits[:0]) == []


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("vocab", VOCABS)
def test_draws_split_the_unit_interval(vocab: int) -> None:
    """The drawn id is the one whose share of the cumulative sum holds the uniform number."""
    logits = 3 * torch.randn(5, vocab, device=DEVICE)
    rows = [4, 0, 2, 1, 3, 3]
    heats = [0.2, 1.0, 0.7, 3.0, 1.3, 1.3]
    uniforms = [0.0, 0.3, 0.9, 1 - 2.0**-53, 0.5, 0.01]
    drawn = OPS.draw(logits, rows, heats, uniforms)
    for row, heat, uniform, id in zip(rows, heats, uniforms, drawn, strict=True):
        sums = torch.softmax(logits[row].double() / heat, 0).cumsum(0).tolist()
        before = sums[id - 1] if id else 0.0
        assert before - 1e-6 <= uniform <= sums[id] + 1e-6
    assert OPS.draw(logits, [], [], []) == []


@pytest.mark.usefixtures("short_parts")
def test_draws_take_only_what_has_weight() -> None:
    lonely = torch.full((3, 40), -200.0, device=DEVICE)
    lonely[:, 21] = 0.0
    lonely[1, :8] = LOWEST
    # A weight of e^-200 is one, and one of LOWEST is none.
    for uniform, drawn in ((0.0, [0, 8, 21]), (0.5, [21] * 3), (1 - 2.0**-53, [21] * 3)):
        assert OPS.draw(lonely, range(3), [1.0, 0.5, 1e-30], [uniform] * 3) == drawn
    even = torch.zeros(4, 64, device=DEVICE)
    uniforms = [0.0, 0.25, 0.499, 1 - 2.0**-53]
    assert OPS.draw(even, range(4), [1.0] * 4, uniforms) == [0, 16, 31, 63]


class Unread(TorchFunctionMode):
    """Within it the host asks for no value of a tensor, which is to wait for the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = getattr(func, "__name__", "") in ("tolist", "item", "cpu", "numpy", "__bool__")
        assert not read or inside_interpreter()
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("vocab", VOCABS)
def test_what_is_chosen_is_what_is_drawn_and_nobody_waits_for_it(vocab: int) -> None:
    logits = tied(6, vocab)
    logits[2, 1:2] = torch.nan
    logits[3] = LOWEST
    draws = [
        Draw(0.0, 0.0),
        Draw(0.7, 0.9),
        Draw(0.0, 0.0),
        Draw(1.3, 0.5),
        Draw(0.9, 0.4, 3, whole=True),
        Draw(3.0, 0.2, 5, top_p=0.4),
    ]
    expected = [
        *OPS.argmax(logits, [0]),
        *OPS.draw(logits, [1], [0.7], [0.9]),
        *OPS.argmax(logits, [2]),
        *OPS.draw(logits, [3], [1.3], [0.5]),
        *OPS.draw_candidates(logits, [4, 5], draws[4:]),
    ]
    order = [4, 0, 5, 2, 1, 3]
    with Unread():
        chosen = OPS.choose(logits, range(6), draws)
        some = OPS.choose(logits, order, [draws[row] for row in order])
    for one in (chosen, ReferenceOps.choose(OPS, logits, range(6), draws)):
        assert one.dtype == torch.int64 and one.tolist() == expected
    assert some.tolist() == [expected[row] for row in order]
    assert OPS.choose(logits, [1, 0], [draws[0]] * 2).tolist() == OPS.argmax(logits, [1, 0])
    assert OPS.choose(logits, [], []).tolist() == []


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("vocab", VOCABS)
def test_draws_from_candidates(vocab: int) -> None:
    """Beside plain PyTorch's numbers and numpy: with what top_k, top_p and min_p leave, ties, and
    more candidates than there are."""
    rng = random.Random(vocab)
    logits = tied(40, vocab)
    logits[7] = LOWEST
    logits[8] = -200.0
    logits[8, vocab // 2] = 0.0
    draws = [
        Draw(
            temperature=rng.choice((1e-20, 0.3, 0.9, 2.5)),
            uniform=rng.choice((0.0, rng.random(), 1 - 2.0**-53)),
            width=rng.choice((1, 2, 7, 64)),
            whole=rng.random() < 0.5,
            top_p=rng.choice((1.0, 0.9, 0.5, 1e-9)),
            min_p=rng.choice((0.0, 0.05, 1.0)),
        )
        for _ in range(40)
    ]
    drawn = OPS.choose(logits, range(40), draws).tolist()
    assert drawn == REF.draw_candidates(logits, range(40), draws)
    assert drawn[7] == ALL_BANNED
    assert (UNDECIDED in drawn) == (vocab > 7)
    alone = [OPS.choose(logits, [row], [draw]).item() for row, draw in enumerate(draws)]
    assert alone == drawn


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_a_row_that_is_not_finite_draws_no_candidate() -> None:
    """Be they few, or so many that they are the host's."""
    logits = tied(3, 100)
    logits[1, 4] = torch.inf
    few, many = Draw(0.9, 0.5, 20, top_p=0.9), Draw(0.9, 0.5, 90, whole=True)
    drawn = OPS.choose(logits, [1, 1, 0, 2], [few, many, many, few]).tolist()
    assert drawn[:2] == [NOT_FINITE] * 2
    assert drawn[2:] == REF.draw_candidates(logits, [0, 2], [many, few])


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("vocab", VOCABS)
def test_log_softmax_top_k(vocab: int) -> None:
    """Few candidates, none, and more than there are."""
    logits = tied(4, vocab)
    rows, counts, heats = [2, 0, 3, 1], [3, 0, 1, 5], [1.0, 0.3, 2.0, 0.9]
    for given in (None, heats):
        found = OPS.log_softmax_top_k(logits, rows, counts, given)
        exact = REF.log_softmax_top_k(logits, rows, counts, given)
        assert found.log_sums_R.dtype == torch.float64
        torch.testing.assert_close(found.log_sums_R, exact.log_sums_R, rtol=0, atol=2e-6)
        assert torch.equal(found.ids, exact.ids) and torch.equal(found.values, exact.values)
    assert OPS.log_softmax_top_k(logits, [], []).ids.shape == (0,)


@pytest.mark.usefixtures("short_parts")
def test_many_candidates_change_no_bit_of_another_row() -> None:
    """They are found in another way."""
    logits = tied(3, 100)
    alone = OPS.log_softmax_top_k(logits, [1], [2])
    found = OPS.log_softmax_top_k(logits, [0, 1], [200, 2])
    order = sorted(range(100), key=lambda id: (-float(logits[0, id]), id))
    assert found.ids.tolist() == order + alone.ids.tolist()
    assert torch.equal(found.log_sums_R[1:], alone.log_sums_R)
    assert torch.equal(found.values, torch.cat((logits[0, order], alone.values)))


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_reported_for_their_row(bad: float) -> None:
    for at in (0, 16, 39):
        logits = torch.randn(3, 40, device=DEVICE)
        logits[1, at] = bad
        wanted = [False, True, False]
        found = OPS.log_softmax_top_k(logits, range(3), [2] * 3)
        assert found.log_sums_R.isnan().tolist() == wanted
        assert ((found.ids >= 0) & (found.ids < 40)).all()
        assert [id == -1 for id in OPS.argmax(logits)] == wanted
        drawn = OPS.draw(logits, range(3), [1.0] * 3, [0.5] * 3)
        assert [id == -1 for id in drawn] == wanted


@pytest.mark.usefixtures("short_parts")
def test_ranks() -> None:
    for vocab in VOCABS:
        logits = tied(4, vocab)
        rows, tokens = [3, 3, 0, 1], [vocab - 1, 0, vocab // 2, vocab // 3]
        orders = [sorted(range(vocab), key=lambda i, x=logits[r]: (-float(x[i]), i)) for r in rows]
        expected = [1 + order.index(token) for order, token in zip(orders, tokens, strict=True)]
        ids = torch.tensor(tokens, device=DEVICE)
        with Unread():
            found = OPS.ranks(logits, rows, ids)
        assert found.dtype == torch.int64 and found.tolist() == expected
    assert OPS.ranks(logits, [], torch.zeros(0, dtype=torch.int64, device=DEVICE)).tolist() == []


def naive_shaping(logits_V: Tensor, shaping: Shaping) -> Tensor:
    """In Python's own numbers, which are float64, id by id."""
    x = logits_V.tolist()
    for id in range(len(x)):
        times = list(shaping.drawn).count(id)
        if id in shaping.bias:
            x[id] += shaping.bias[id]
        if times or id in shaping.seen:
            x[id] = x[id] / shaping.repetition if x[id] > 0 else x[id] * shaping.repetition
        if times:
            x[id] -= shaping.presence + shaping.frequency * times
        words = shaping.allowed
        allowed = words is None or int(words[id // 32]) >> id % 32 & 1
        if id in shaping.banned or not allowed:
            x[id] = LOWEST
    return torch.tensor(x, dtype=torch.float32, device=logits_V.device)


def some_shaping(rng: random.Random, vocab: int) -> Shaping:
    def some(most: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(rng.randrange(most + 1))]

    words = np.array([rng.getrandbits(32) for _ in range(-(-vocab // 32))], dtype=np.uint32)
    return Shaping(
        bias={token: rng.uniform(-100, 100) for token in some(5)},
        seen=tuple(some(50)),
        drawn=some(20),
        repetition=rng.choice((1.0, 0.3, 1.7)),
        presence=rng.choice((0.0, -1.3, 2.0)),
        frequency=rng.choice((0.0, 0.1, -0.7)),
        banned=some(3),
        allowed=rng.choice((None, words)),
    )


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("vocab", [1, 17, 300])
def test_shaping_has_one_rounding_and_leaves_nothing_behind(vocab: int) -> None:
    rng = random.Random(vocab)
    logits = 4 * torch.randn(6, vocab, device=DEVICE)
    logits[0] = -0.0
    before = logits.view(torch.int32).clone()
    rows = [0, 5, 3, 2]
    shapings = [some_shaping(rng, vocab) for _ in rows[1:]]
    shapings.append(shapings[0]._replace(allowed=np.array([1] * 10, dtype=np.uint32)))
    expected = logits.clone()
    for row, shaping in zip(rows, shapings, strict=True):
        expected[row] = naive_shaping(logits[row], shaping)
    with OPS.shaped(logits, rows, shapings):
        assert torch.equal(logits.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(logits.view(torch.int32), before)
    with pytest.raises(RuntimeError, match="drawing"), OPS.shaped(logits, rows, shapings):
        raise RuntimeError("drawing failed")
    assert torch.equal(logits.view(torch.int32), before)
    with OPS.shaped(logits, [], []):
        assert torch.equal(logits.view(torch.int32), before)


@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("vocab", [1, 17, 300])
def test_what_the_device_alone_knows_is_drawn_once_more(vocab: int) -> None:
    """Whether a shaping names it already, as whatever, or not; where the vocabulary begins and where
    it ends. The bits are those of a loop that knows it."""
    rng = random.Random(vocab)
    logits = 4 * torch.randn(6, vocab, device=DEVICE)
    logits[0] = -0.0
    before = logits.view(torch.int32).clone()
    rows = [5, 0, 3, 2, 1]
    for _ in range(8):
        shapings = [some_shaping(rng, vocab) for _ in rows[1:]]
        shapings.append(PLAIN._replace(repetition=0.7, presence=0.4, frequency=0.3))
        newest = [some_id(shaping, vocab, rng) for shaping in shapings]
        expected = logits.clone()
        for row, shaping, id in zip(rows, shapings, newest, strict=True):
            known = shaping._replace(drawn=[*shaping.drawn, id])
            expected[row] = naive_shaping(logits[row], known)
        newest_R = ids(*newest)
        with Unread(), OPS.shaped(logits, rows, shapings, newest_R):
            shaped = logits.clone()
        assert torch.equal(shaped.view(torch.int32), expected.view(torch.int32))
        assert torch.equal(logits.view(torch.int32), before)
        with REF.shaped(logits, rows, shapings, newest_R):
            assert torch.equal(logits.view(torch.int32), expected.view(torch.int32))


def some_id(shaping: Shaping, vocab: int, rng: random.Random) -> int:
    """One that the shaping names, or another, or the first, or the last."""
    named = [*shaping.bias, *shaping.seen, *shaping.drawn, *shaping.banned]
    return rng.choice((rng.choice(named or [0]), rng.randrange(vocab), 0, vocab - 1))


@pytest.mark.parametrize(
    ("id", "logit", "expected"),
    [
        pytest.param(0, 1.0, 1.0 / 0.5 - (0.25 + 0.125), id="new"),
        pytest.param(1, -1.0, -1.0 * 0.5 - (0.25 + 0.125), id="new-negative"),
        pytest.param(2, 1.0, (1.0 + 2.0) / 0.5 - (0.25 + 0.125), id="biased"),
        pytest.param(3, -1.0, -1.0 * 0.5 - (0.25 + 0.125), id="of-the-prompt"),
        pytest.param(4, 1.0, 1.0 / 0.5 - (0.25 + 2 * 0.125), id="drawn-once"),
        pytest.param(5, -1.0, -1.0 * 0.5 - (0.25 + 4 * 0.125), id="drawn-three-times"),
        pytest.param(6, 1.0, LOWEST, id="banned"),
        pytest.param(7, 1.0, 1.0 / 0.5 - (0.25 + 0.125), id="last"),
    ],
)
@pytest.mark.parametrize("ops", [OPS, REF], ids=["kernels", "reference"])
def test_penalties_by_hand(ops: TritonOps, id: int, logit: float, expected: float) -> None:
    """All numbers are exact in binary. Another row, with nothing to penalise, is left alone."""
    logits = torch.full((2, 8), logit, device=DEVICE)
    given = Shaping({2: 2.0}, (3, 3), (5, 4, 5, 5), 0.5, 0.25, 0.125, (6,))
    with ops.shaped(logits, [1, 0], [given, PLAIN], ids(id, id)):
        assert logits[1, id].item() == expected
        assert logits[0].tolist() == [logit] * 8
    assert logits.tolist() == [[logit] * 8] * 2


@pytest.mark.usefixtures("short_parts")
def test_what_is_not_finite_stays_so_where_others_are_allowed() -> None:
    """But infinity, which is bounded as all is that is not allowed."""
    logits = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1.0]], device=DEVICE)
    nothing = Shaping({}, (), (), 1.0, 0.0, 0.0, (), np.zeros(1, dtype=np.uint32))
    with OPS.shaped(logits, [0], [nothing]), REF.shaped(logits.clone(), [0], [nothing]):
        assert logits[0, 0].isnan()
        assert logits[0, 1:].tolist() == [LOWEST, -torch.inf, LOWEST]


@pytest.mark.parametrize("prompt", [0, 400])
def test_named_ids_take_no_more_memory_than_is_planned(prompt: int) -> None:
    """64 bytes for each that counts (engine/step_memory.py), of rows with many and with none."""
    logits = torch.zeros(3, 500, device=DEVICE)
    shapings = [PLAIN._replace(seen=range(prompt), repetition=1.5)] * 3
    listed = triton_sampling._Listed(triton_sampling._Rows(logits, range(3)), shapings)
    made = (*listed.changes, *listed.with_newest(ids(1, 2, 3)), listed._numbers)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in made}
    assert sum(storages.values()) <= 64 * sum(shaping.num_ids for shaping in shapings)


WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.3},
    {"top_k": 5},
    {"top_k": 5, "top_p": 0.8},
    {"top_k": 5, "min_p": 0.1},
)
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"presence_penalty": 1.1},
    {"frequency_penalty": -0.7},
    {"repetition_penalty": 0.4, "logit_bias": {7: 2.0, 39: -1.0}},
    {"repetition_penalty": 1.7, "frequency_penalty": 0.3, "presence_penalty": -0.2},
    {"min_tokens": 4, "stop_token_ids": (0, 7, 11)},
    {"min_tokens": 5, "stop_token_ids": (0, 7, 11), "repetition_penalty": 1.2},
)


@pytest.mark.usefixtures("short_parts")
def test_no_token_is_waited_for_before_the_next_is_drawn() -> None:
    """With what is asked of it in all ways, together; and the bits are those that the host gets where
    it knows the token."""
    rng = random.Random(1)
    wishes = [{**way, **change} for way in WAYS for change in CHANGES]
    output = [7, 4, 4]
    newest = [rng.choice((0, 4, 5, 7, 39)) for _ in wishes]
    for row, wish in enumerate(wishes):
        wish.update(logprobs=rng.choice((None, 0, 3)), seed=row)
    earlier = [behind(output, wish) for wish in wishes]
    known = [behind([*output, id], wish) for wish, id in zip(wishes, newest, strict=True)]
    logits = 3 * torch.randn(len(wishes), 40, device=DEVICE)
    positions = [request.num_tokens for request in known]
    newest_L = ids(*newest)
    with Unread():
        drawing = sampler.begin(logits, earlier, positions, OPS, newest_L)
    assert drawing.outcomes == sampler.sample(logits, known, OPS)
    exact = logits.double().log_softmax(-1)
    for row, (outcome, wish) in enumerate(zip(drawing.outcomes, wishes, strict=True)):
        assert isinstance(outcome, sampler.Sampled)
        assert (outcome.logprob is None) == (wish["logprobs"] is None)
        if outcome.logprob is not None:
            own = exact[row, outcome.token_id]
            assert outcome.logprob.logprob == pytest.approx(own.item(), abs=1e-5)
            assert outcome.logprob.rank == 1 + int((exact[row] > own).sum())
            best = exact[row].sort(descending=True).indices[: wish["logprobs"]]
            assert [id for id, _ in outcome.logprob.top] == best.tolist()


def behind(output: list[int], wish: dict[str, Any]) -> Request:
    """A request behind a prompt and so much output."""
    params = SamplingParams(max_tokens=9, **wish)
    limits = ServingLimits(40, 100)
    asked = EngineRequest.create(
        "r", [5, 7, 7], params, limits, arrival=0.0, seed=wish["seed"], output_ids=output
    )
    return Request(asked)


PLAIN = Shaping({}, (), (), 1.0, 0.0, 0.0, ())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x: OPS.argmax(x, [2]), r"rows from 2 to 2 are not all below 2"),
        (lambda x: OPS.ranks(x, [0, 1], ids(0)), "1 parameters for 2 rows"),
        (lambda x: OPS.ranks(x, [2], ids(0)), r"rows from 2 to 2 are not all below 2"),
        (lambda x: OPS.draw(x, [0, 1], [1.0], [0.5, 0.5]), "1 parameters for 2 rows"),
        (lambda x: OPS.argmax(x.double()), "contiguous float32, not torch.float64"),
        (lambda x: OPS.argmax(x.T), "contiguous float32"),
        (lambda x: shape(x, PLAIN._replace(banned=(5,))), "outside the vocabulary of 5"),
        (lambda x: shape(x, PLAIN._replace(bias={-1: 1.0})), "outside the vocabulary of 5"),
        (lambda x: shape(x, PLAIN._replace(allowed=np.zeros(0, np.uint32))), "1 words of uint32"),
        (lambda x: shape(x, PLAIN, ids(1)), "1 parameters for 2 rows"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[Tensor], object], says: str) -> None:
    logits = torch.zeros(2, 5, device=DEVICE)
    with pytest.raises((IndexError, ValueError), match=says):
        call(logits)
    assert not logits.any()


def ids(*ids: int) -> Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=DEVICE)


def shape(logits: Tensor, wrong: Shaping, newest: Tensor | None = None) -> None:
    with OPS.shaped(logits, [0, 1], [PLAIN._replace(banned=(1,)), wrong], newest):
        pytest.fail("shaped")


@pytest.mark.usefixtures("short_parts")
def test_a_row_is_itself_in_any_company() -> None:
    logits = tied(6, 70)

    def results(rows: list[int]) -> tuple[object, ...]:
        heats = [0.5 + row for row in rows]
        found = OPS.log_softmax_top_k(logits, rows, [3] * len(rows), heats)
        place = rows.index(2)
        return (
            OPS.draw(logits, rows, heats, [0.1 * row for row in rows])[place],
            found.log_sums_R[place].item(),
            found.ids.view(-1, 3)[place].tolist(),
        )

    assert results([5, 2, 0, 4]) == results([2])


@pytest.mark.exhaustive
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU compiles what it runs")
def test_kernels_compile() -> None:
    allowed = np.zeros(5_000, dtype=np.uint32)
    with launches() as seen:
        logits = torch.zeros(2, 151_936)
        OPS.argmax(logits)
        OPS.draw(logits, [0, 1], [1.0] * 2, [0.5] * 2)
        OPS.log_softmax_top_k(logits, [0, 1], [20, 1])
        OPS.log_softmax_top_k(logits[:, :100].contiguous(), [0, 1], [1, 1])
        OPS.ranks(logits, [0, 1], ids(3, 4))
        OPS.choose(logits, [0, 1], [Draw(0.8, 0.5, 20, whole=True), Draw(0.0, 0.0)])
        with OPS.shaped(logits, [1], [PLAIN._replace(banned=(1, 2), allowed=allowed)], ids(3)):
            pass
    assert_compile(seen, kernels)
