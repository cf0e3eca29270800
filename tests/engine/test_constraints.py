"""Constraints in the engine: each trap of llguidance's, what ends a request, what fails alone."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llguidance import LLMatcher

import moebius
from moebius.engine import constraints as constraints_module
from moebius.engine import follower as follower_module
from moebius.engine.client import StepOutput
from moebius.engine.constraints import Constraints
from moebius.engine.engine import Engine
from moebius.engine.follower import Follower
from moebius.engine.restriction import Restriction
from moebius.engine.sampler import Sampled, sample
from moebius.errors import ConstraintError
from moebius.models.store.load import load_decoder
from moebius.ops import LOWEST, Shaping
from moebius.ops.cpu import CpuOps
from moebius.ops.reference import ReferenceOps
from moebius.ops.sampling import ALL_BANNED, NOT_FINITE
from moebius.request.constraint import Constraint, Grammar, ReasoningBudget
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams, ServingLimits
from moebius.schedule.request import Request
from moebius.text import Tokenizer, load_tokenizer
from moebius.text.masks import Vocabulary
from ops.levels import logits_seen
from random_schedules import Schedule, parts

BUNDLED = Path(moebius.__file__).parent / "bundled"
TOKENIZER = load_tokenizer(BUNDLED)
OPS = CpuOps(2)
DECODER = load_decoder(BUNDLED, torch.bfloat16, ops=OPS)
END = min(TOKENIZER.end_ids)
PROMPT = tuple(TOKENIZER.encode("def f(x):"))
FOREVER = "start: /[a-z ]*/"


def lark(text: str, **more: Any) -> Constraint:
    return Constraint(Grammar(json.dumps({"grammars": [{"lark_grammar": text}]}), **more))


def build(tokenizer: Callable[[], Tokenizer] = lambda: TOKENIZER, seqs: int = 8) -> Engine:
    runner, scheduler, info = parts(DECODER, Schedule(16, 128, seqs, 64, True, (0,), 1))
    ends = TOKENIZER.end_ids
    info = replace(info, eos_ids=ends)
    constraints = Constraints(tokenizer, info.limits.vocab_size, ends)
    return Engine(runner, scheduler, info, constraints=constraints)


def ask(
    engine: Engine, constraint: Constraint | None, id: str = "r", seed: int = 0, **params: Any
) -> Request:
    output_ids = params.pop("output_ids", ())
    asked = EngineRequest.create(
        id,
        PROMPT,
        SamplingParams(**{"temperature": 1.0, "max_tokens": 40, **params}),
        engine.info.limits,
        arrival=0.0,
        eos_ids=engine.info.eos_ids,
        seed=seed,
        constraint=constraint,
        output_ids=output_ids,
    )
    request = Request(asked)
    engine.add(request)
    return request


def run(engine: Engine) -> dict[str, list[StepOutput]]:
    found: dict[str, list[StepOutput]] = {}
    while engine.has_work:
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    return found


def answer(constraint: Constraint | None, **params: Any) -> tuple[list[int], StepOutput]:
    """The tokens, and the last output."""
    engine = build()
    outputs = run_one(engine, constraint, **params)
    engine.close()
    return [token for each in outputs for token in each.token_ids], outputs[-1]


def run_one(engine: Engine, constraint: Constraint | None, **params: Any) -> list[StepOutput]:
    ask(engine, constraint, **params)
    return run(engine)["r"]


def text(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=False)


def test_a_request_ends_with_the_token_that_completes_its_grammar() -> None:
    tokens, last = answer(lark('start: "[" /[0-9]{3}/ "]"'))
    assert text(tokens)[0] == "[" and text(tokens)[-1] == "]" and len(text(tokens)) == 5
    assert last.finish_reason is FinishReason.COMPLETE and last.token_ids == (tokens[-1],)
    assert END not in tokens


def test_a_truncated_answer_says_length_and_one_that_just_fits_does_not() -> None:
    tokens, _ = answer(lark('start: "[" /[0-9]{3}/ "]"'))
    fits = answer(lark('start: "[" /[0-9]{3}/ "]"'), max_tokens=len(tokens))
    assert fits[0] == tokens and fits[1].finish_reason is FinishReason.COMPLETE
    cut = answer(lark('start: "[" /[0-9]{3}/ "]"'), max_tokens=len(tokens) - 1)
    assert cut[0] == tokens[:-1] and cut[1].finish_reason is FinishReason.LENGTH


def test_an_end_token_ends_what_may_go_on_and_is_not_fed_to_the_grammar() -> None:
    """Trap b. Where the end token is likely it is drawn as soon as the grammar takes an end."""
    tokens, last = answer(lark("start: /[0-9]{2}[a-z]*/"), logit_bias={END: 100})
    assert last.finish_reason is FinishReason.STOP and tokens[-1] == END
    assert text(tokens[:-1])[:2].isdigit() and len(text(tokens[:-1])) >= 2


def test_where_end_tokens_are_ignored_none_is_drawn_and_the_grammar_ends_the_request() -> None:
    tokens, last = answer(
        lark("start: /[0-9]{2}[a-z]{0,4}/"), logit_bias={END: 100}, ignore_eos=True
    )
    assert END not in tokens and last.finish_reason is FinishReason.COMPLETE
    assert len(text(tokens)) == 6


def test_min_tokens_give_way_to_the_grammar() -> None:
    tokens, last = answer(lark('start: "yes" | "no"'), min_tokens=20)
    assert text(tokens) in ("yes", "no") and last.finish_reason is FinishReason.COMPLETE
    stop = TOKENIZER.encode("7", False)
    tokens, last = answer(lark('start: "7" /[a-c]{3}/'), min_tokens=3, stop_token_ids=stop)
    assert text(tokens)[0] == "7" and len(text(tokens)) == 4
    assert last.finish_reason is FinishReason.COMPLETE
    tokens, last = answer(lark("start: /[0-9]+/"), min_tokens=12, logit_bias={END: 100})
    assert len(tokens) == 13 and tokens[-1] == END and END not in tokens[:12]


@pytest.mark.parametrize(
    ("constraint", "params"),
    [
        (lark('start: "a" | "b"'), {"allowed_token_ids": TOKENIZER.encode("c", False)}),
        (lark('start: "a"'), {"min_tokens": 1, "ignore_eos": True, "stop_token_ids": [END]}),
        (lark('start: ""'), {"ignore_eos": True}),
        (lark('start: ""'), {"min_tokens": 2}),
    ],
)  # fmt: skip
def test_where_nothing_is_left_to_draw_the_request_ends_with_a_typed_error(
    constraint: Constraint, params: dict[str, Any]
) -> None:
    tokens, last = answer(constraint, **params)
    if "stop_token_ids" in params:  # which the grammar does not need
        assert text(tokens) == "a" and last.finish_reason is FinishReason.COMPLETE
        return
    assert tokens == [] and last.finish_reason is FinishReason.ERROR
    assert isinstance(last.error, ConstraintError) and "no token" in str(last.error)
    # In which field a grammar came, no engine knows.
    ids = "allowed_token_ids"
    assert last.error.param == (ids if ids in params else None)


def test_allowed_ids_and_bad_words_hold_every_token() -> None:
    allowed = TOKENIZER.encode("abcdefgh", False)
    tokens, _ = answer(None, allowed_token_ids=allowed, max_tokens=30)
    assert len(tokens) == 30 and set(tokens) <= set(allowed)
    free, _ = answer(None, max_tokens=30)
    pair = (free[3], free[4])
    held, _ = answer(Constraint(bad_words=(pair,)), max_tokens=30)
    assert held[:4] == free[:4] and held[4] != free[4]
    assert pair not in list(pairwise(held))


def failing(monkeypatch: pytest.MonkeyPatch, spoiled: str) -> None:
    """Let this request's matcher meet an error when its third mask is made."""
    mask = Follower._mask

    def made(self: Follower, matcher: LLMatcher) -> Any:
        if self.request.id == spoiled and len(self.request.output_ids) == 2:
            matcher.consume_token(0)
        return mask(self, matcher)

    monkeypatch.setattr(Follower, "_mask", made)


def test_a_matcher_in_error_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap a: its mask would allow end tokens alone, and the answer would look well."""
    engine = build()
    for i in range(3):
        ask(engine, lark(FOREVER), f"r{i}", seed=i, max_tokens=8, ignore_eos=True)
    expected = run(engine)
    failing(monkeypatch, "r1")
    for i in range(3):
        ask(engine, lark(FOREVER), f"r{i}", seed=i, max_tokens=8, ignore_eos=True)
    found = run(engine)
    last = found["r1"][-1]
    assert last.finish_reason is FinishReason.ERROR and isinstance(last.error, ConstraintError)
    assert last.error.param is None
    assert "\n" not in str(last.error), "trap f: the rest is the parser's state"
    assert sum(len(each.token_ids) for each in found["r1"]) == 2
    for id in ("r0", "r2"):
        assert [each.token_ids for each in found[id]] == [each.token_ids for each in expected[id]]
    engine.close()


def test_a_grammar_that_does_not_compile_ends_its_request_alone() -> None:
    engine = build()
    ask(engine, lark("start: <nosuch>"), "bad")
    ask(engine, lark('start: "yes"'), "good")
    found = run(engine)
    assert isinstance(found["bad"][-1].error, ConstraintError)
    assert found["bad"][-1].error.param is None
    assert "nosuch" in str(found["bad"][-1].error)
    assert found["good"][-1].finish_reason is FinishReason.COMPLETE
    engine.close()


def test_a_request_whose_grammar_is_being_compiled_waits_and_nobody_else_does() -> None:
    gate = threading.Event()

    def slow() -> Tokenizer:
        gate.wait(60)
        return TOKENIZER

    engine = build(slow)
    ask(engine, lark('start: "yes"'), "held")
    ask(engine, None, "free", max_tokens=6, ignore_eos=True)
    outputs = [output for _ in range(7) for output in engine.step()]
    assert {output.request_id for output in outputs} == {"free"}
    assert sum(len(output.token_ids) for output in outputs) == 6
    gate.set()
    found = run(engine)["held"]
    assert text([token for each in found for token in each.token_ids]) == "yes"
    engine.close()


def test_a_mask_that_takes_longer_than_steps_holds_up_its_own_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask = Follower._mask
    gate = threading.Event()

    def made(self: Follower, matcher: LLMatcher) -> Any:
        if self.request.id == "slow" and len(self.request.output_ids) == 1:
            gate.wait(60)
        return mask(self, matcher)

    expected, _ = answer(lark(FOREVER), max_tokens=6, ignore_eos=True)
    monkeypatch.setattr(Follower, "_mask", made)
    engine = build()
    ask(engine, lark(FOREVER), "slow", max_tokens=6, ignore_eos=True)
    ask(engine, lark(FOREVER), "quick", seed=1, max_tokens=6, ignore_eos=True)
    ask(engine, None, "free", max_tokens=6, ignore_eos=True)
    outputs: list[StepOutput] = []
    for _ in range(300):
        outputs += engine.step()
        if {each.request_id for each in outputs if each.finish_reason} == {"quick", "free"}:
            break
    assert [each.token_ids for each in outputs if each.request_id == "slow"] == [(expected[0],)]
    assert sum(len(each.token_ids) for each in outputs if each.request_id == "quick") == 6
    gate.set()
    rest = [token for each in run(engine)["slow"] for token in each.token_ids]
    assert [expected[0], *rest] == expected
    engine.close()


def test_a_grammar_that_is_never_compiled_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def slow() -> Tokenizer:
        gate.wait(60)
        return TOKENIZER

    monkeypatch.setattr(follower_module, "MOST_SECONDS", 0.2)
    engine = build(slow)
    last = run_one(engine, lark('start: "yes"'))[-1]
    assert isinstance(last.error, ConstraintError) and "to compile" in str(last.error)
    gate.set()
    engine.close()


def test_an_engine_without_a_tokenizer_says_so() -> None:
    runner, scheduler, info = parts(DECODER, Schedule(16, 128, 8, 64, True, (0,), 1))
    engine = Engine(runner, scheduler, info)
    last = run_one(engine, lark('start: "yes"'))[-1]
    assert isinstance(last.error, ConstraintError) and "no tokenizer" in str(last.error)


def test_an_answer_goes_on_from_tokens_that_another_engine_has_drawn() -> None:
    """A replay: at every place the rest is the same, and so is the end."""
    constraint = lark('start: "{" /[a-z]{3}/ ("," /[0-9]{1,2}/)* "}"')
    engine = build()
    whole = run_one(engine, constraint, max_tokens=20)
    tokens = [token for each in whole for token in each.token_ids]
    for cut in range(1, len(tokens)):
        rest = run_one(engine, constraint, max_tokens=20, output_ids=tokens[:cut])
        assert [token for each in rest for token in each.token_ids] == tokens[cut:]
        assert rest[-1].finish_reason is whole[-1].finish_reason
    engine.close()


def test_a_step_that_is_rolled_back_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matcher has read a token that the request never got."""
    constraint = lark("start: /[a-z]{2,9};/")
    expected, _ = answer(constraint, ignore_eos=True)
    engine = build()
    request = ask(engine, constraint, ignore_eos=True)
    update = engine.scheduler.update
    rng = random.Random(0)
    interrupts = 0

    def interrupted(plan: Any, tokens: Any) -> Any:
        nonlocal interrupts
        if rng.random() < 0.5:
            interrupts += 1
            engine.scheduler.rollback(plan)
            return []
        return update(plan, tokens)

    monkeypatch.setattr(engine.scheduler, "update", interrupted)
    for _ in range(200):
        plan = engine._plan()
        if not plan.chunks:
            break
        engine._constraints.fill(plan, engine.scheduler.requests)
        results = engine._sample(engine._execute(plan))
        drawn = {id: [each.token_id for each in row] for id, row in results.sampled.items()}
        interrupted(plan, drawn)
        if request.output_ids == expected:
            break
    assert request.output_ids == expected and interrupts > 1


def thinking(**more: Any) -> Constraint:
    after = tuple(TOKENIZER.encode("#", False))
    return lark('start: "yes" | "no"', after=(after,), **more)


def test_a_grammar_begins_behind_the_reasoning_which_no_end_token_cuts_short() -> None:
    mark = TOKENIZER.encode("#", False)[0]
    star = TOKENIZER.encode("*", False)[0]
    biased = {"logit_bias": {END: 100, star: 99}}
    tokens, last = answer(thinking(banned=(star,)), max_tokens=10, **biased)
    assert last.finish_reason is FinishReason.LENGTH and len(tokens) == 10
    assert END not in tokens and star not in tokens
    for seed in range(20):
        tokens, last = answer(thinking(), seed=seed, logit_bias={mark: 4})
        if mark in tokens:
            assert text(tokens[tokens.index(mark) + 1 :]) in ("yes", "no")
            assert last.finish_reason is FinishReason.COMPLETE
            return
    pytest.fail("the mark was never drawn")


def test_reasoning_that_the_model_opens_itself_or_does_not() -> None:
    opener, mark = (TOKENIZER.encode(each, False)[0] for each in ("@", "#"))
    constraint = thinking(openers=(opener,))
    tokens, _ = answer(constraint, logit_bias={opener: -100})
    assert text(tokens) in ("yes", "no")
    tokens, last = answer(constraint, logit_bias={opener: 100, mark: 3}, max_tokens=60)
    assert tokens[0] == opener
    if mark in tokens:
        assert text(tokens[tokens.index(mark) + 1 :]) in ("yes", "no")
    else:
        assert last.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("ops", [OPS, ReferenceOps()], ids=["kernels", "reference"])
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 700])
def test_others_than_the_allowed_ids_are_lowest_and_come_back(ops: Any, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(3, vocab, generator=generator)
    before = logits.clone()
    bits = torch.rand(vocab, generator=generator) < 0.3
    bits[0] = True
    words = np.zeros(-(-vocab // 32), dtype=np.uint32)
    for token in bits.nonzero().flatten().tolist():
        words[token // 32] |= np.uint32(1) << np.uint32(token % 32)
    plain = Shaping({0: 2.0}, (), (), 1.0, 0.0, 0.0, (), words)
    naive = before.clone()
    naive[1, 0] += 2.0
    naive[1, ~bits] = LOWEST
    with ops.shaped(logits, [1], [plain]):
        assert torch.equal(logits_seen(ops, logits), naive)
    assert torch.equal(logits, before)
    assert torch.equal(logits_seen(ops, logits), before)


@pytest.mark.parametrize("ops", [OPS, ReferenceOps()], ids=["kernels", "reference"])
def test_a_row_of_which_nothing_is_left(ops: Any) -> None:
    """Neither the most likely id nor a drawn one; with a NaN in it, it is broken and not banned."""
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    logits[2, 1500] = torch.nan
    nothing = Shaping({}, (), (), 1.0, 0.0, 0.0, (), np.zeros(63, dtype=np.uint32))
    with ops.shaped(logits, [1, 2], [nothing, nothing]):
        assert ops.argmax(logits) == [int(logits[0].argmax()), ALL_BANNED, NOT_FINITE]
        drawn = ops.draw(logits, [0, 1, 2], [1.0] * 3, [0.5] * 3)
        assert drawn[0] >= 0 and drawn[1:] == [ALL_BANNED, NOT_FINITE]
        assert ops.log_softmax_top_k(logits, [1], [3]).values.tolist() == [LOWEST] * 3


def test_log_probabilities_stay_the_models_own() -> None:
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    request = Request(
        EngineRequest.create(
            "r",
            [1],
            SamplingParams(temperature=0, logprobs=2),
            ServingLimits(64, 100),
            arrival=0.0,
            constraint=lark("x"),
        )
    )
    worst = int(logits.argmin())
    words = np.zeros(2, dtype=np.uint32)
    words[worst // 32] = np.uint32(1) << np.uint32(worst % 32)
    drawn = sample(logits, [request], OPS, [Restriction(words)])[0]
    assert isinstance(drawn, Sampled) and drawn.token_id == worst and drawn.logprob is not None
    expected = torch.log_softmax(logits[0].double(), -1)
    assert drawn.logprob.logprob == pytest.approx(float(expected[worst]), abs=1e-5)
    assert drawn.logprob.rank == 64 and drawn.logprob.top[0][0] == int(logits.argmax())


def test_compiled_grammars_are_kept_for_a_while() -> None:
    grammars = constraints_module.Grammars(lambda: TOKENIZER, 4096, TOKENIZER.end_ids)
    first = grammars.compiled('start: "a"')
    assert grammars.compiled('start: "a"') is first
    bad = grammars.compiled("start: <nosuch>")
    with pytest.raises(ConstraintError):
        bad.result(60)
    assert grammars.compiled("start: <nosuch>") is not bad, "what failed is tried again"
    kept: list[Future[Any]] = [grammars.compiled(f'start: "{i}"') for i in range(40)]
    assert grammars.compiled('start: "a"') is not first
    assert grammars.compiled('start: "39"') is kept[39]
    grammars.close()


def test_a_mask_is_a_function_of_the_tokens_read() -> None:
    """Rebuilt by reading all tokens at once, a matcher allows what the one allows that read them
    one by one and made a mask at each."""
    vocabulary = Vocabulary(TOKENIZER, 4100, TOKENIZER.end_ids)
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "n": {"type": "number"}},
    }
    grammar = json.dumps({"grammars": [{"json_schema": schema}]})
    rng = random.Random(0)
    for _ in range(10):
        matcher = vocabulary.matcher(grammar)
        drawn: list[int] = []
        while not matcher.is_stopped() and len(drawn) < 40:
            mask = matcher.compute_bitmask()
            again = vocabulary.matcher(grammar)
            assert not drawn or again.consume_tokens(drawn)
            assert again.compute_bitmask() == mask
            bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
            allowed = [token for token in np.flatnonzero(bits).tolist() if token != END]
            drawn.append(rng.choice(allowed))
            assert matcher.consume_token(drawn[-1])


def test_reasoning_ends_at_its_budget_and_all_else_is_as_without() -> None:
    """What was drawn before is the same; what comes behind is what the model says behind these
    tokens, which a replay gives back."""
    start, end = tuple(TOKENIZER.encode("<")), tuple(TOKENIZER.encode("\n>"))
    free, _ = answer(None, max_tokens=30)
    for begun in (True, False):
        first = 0 if begun else 4
        opener = start if begun else tuple(free[:4])  # which are said once
        budget = ReasoningBudget(6, opener, end, begun=begun)
        held, last = answer(Constraint(budget=budget), max_tokens=30)
        cut = first + 6
        assert held[:cut] == free[:cut]
        assert tuple(held[cut : cut + len(end)]) == end != tuple(free[cut : cut + len(end)])
        told = held[: cut + len(end)]
        again, _ = answer(None, max_tokens=30, output_ids=tuple(told))
        assert again == held[len(told) :] and last.finish_reason is FinishReason.LENGTH
    longer = ReasoningBudget(40, start, end, begun=True)
    assert answer(Constraint(budget=longer), max_tokens=30)[0] == free
