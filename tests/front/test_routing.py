"""The engine that a request waits the shortest time at."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from moebius.front.routing import EngineLoad, choose
from moebius.request.engine_request import EngineRequest
from moebius.request.hashes import BlockHasher
from moebius.request.params import SamplingParams, ServingLimits

LIMITS = ServingLimits(vocab_size=100, max_model_len=500)
HASHER = BlockHasher(bytes(32), b"a model", 4)


def ask(id: str, prompt: list[int], output: tuple[int, ...] = ()) -> EngineRequest:
    params = SamplingParams(max_tokens=8)
    return EngineRequest.create(
        id, prompt, params, LIMITS, arrival=0.0, output_ids=output, hasher=HASHER
    )


def engines(count: int, num_blocks: int = 100) -> list[EngineLoad]:
    return [EngineLoad(num_blocks, 4) for _ in range(count)]


def routed(request: EngineRequest, loads: list[EngineLoad]) -> int:
    number = choose(request, enumerate(loads))
    assert number is not None
    loads[number].give(request)
    return number


def test_the_fewest_tokens_before_the_first_one_win() -> None:
    loads = engines(3)
    assert routed(ask("a", [1] * 40), loads) == 0
    assert routed(ask("b", [2] * 10), loads) == 1
    assert routed(ask("c", [3] * 15), loads) == 2
    assert routed(ask("d", [4] * 20), loads) == 1  # 10, 15 and 40 are owed
    assert [load.tokens for load in loads] == [40, 30, 15]


def test_what_has_its_first_token_counts_no_more() -> None:
    loads = engines(2)
    routed(ask("a", [1] * 40), loads)
    loads[0].answered("a")
    loads[0].answered("a")
    loads[0].answered("of another engine")
    assert loads[0].tokens == 0
    assert routed(ask("b", [2] * 10), loads) == 0


def test_a_cached_prefix_counts_for_the_engine_that_has_it() -> None:
    loads = engines(2)
    shared = list(range(1, 41))
    routed(ask("a", shared), loads)
    loads[0].answered("a")
    routed(ask("b", [50] * 8), loads)  # to 0, which owes 8 tokens now
    # 8 owed and 4 of its own there; 44 of its own at the other.
    assert routed(ask("c", [*shared, 60, 61, 62, 63]), loads) == 0
    assert loads[0].tokens == 12


def test_equal_engines_and_the_longer_prefix() -> None:
    loads = engines(2)
    prompt = list(range(1, 9))
    loads[1].give(ask("a", prompt))
    loads[1].answered("a")
    loads[1].give(ask("b", [70, 71, 72, 73]))
    # 0 would owe its 8 tokens; 1 owes 4 of another's, and would owe its second block.
    request = ask("d", prompt)
    assert [load.owes(request) for load in loads] == [8, 8]
    assert choose(request, enumerate(loads)) == 1


def test_a_hit_is_whole_blocks_without_the_last_token() -> None:
    """As in an engine, where at most (tokens - 1) // block_size blocks are found."""
    load = EngineLoad(100, 4)
    load.give(ask("a", list(range(1, 9))))
    load.answered("a")
    assert load.owes(ask("b", list(range(1, 9)))) == 4
    assert load.owes(ask("c", list(range(1, 10)))) == 1
    assert load.owes(ask("d", list(range(1, 8)))) == 3
    # A replay owes its output, too, and finds the whole of its prompt.
    assert load.owes(ask("e", list(range(1, 9)), output=(5, 6, 7))) == 3
    # Log-probabilities of a prompt take all of its tokens.
    scored = SamplingParams(max_tokens=8, prompt_logprobs=0)
    assert load.owes(replace(ask("f", list(range(1, 9))), params=scored)) == 8


def test_no_more_blocks_are_remembered_than_there_are() -> None:
    """The end of the prompt that was seen longest ago is forgotten first, as in an engine."""
    load = EngineLoad(3, 4)
    load.give(ask("a", list(range(1, 13))))
    load.give(ask("b", [50] * 4))
    assert load.cached_tokens(ask("c", list(range(1, 14)))) == 8
    load.give(ask("d", [60] * 12))
    assert load.cached_tokens(ask("e", list(range(1, 14)))) == 0
    assert load.cached_tokens(ask("f", [50] * 5)) == 0
    assert load.cached_tokens(ask("g", [60] * 13)) == 12


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_one_of_the_sentence(seed: int) -> None:
    """The fewest tokens left to compute before its first token, those queued and running and its
    own uncached ones; ties to the longer prefix. Counted here anew for each request."""
    chance = random.Random(seed)
    loads = engines(3)
    given: list[list[EngineRequest]] = [[], [], []]
    left: list[dict[str, int]] = [{}, {}, {}]

    def uncached(request: EngineRequest, engine: int) -> int:
        blocks = {tuple(each.prompt_ids[: 4 * k]) for each in given[engine] for k in range(1, 9)}
        found = 0
        while (end := 4 * (found + 1)) < len(request.prompt_ids):
            if request.prompt_ids[:end] not in blocks:
                break
            found += 1
        return len(request.prompt_ids) - 4 * found

    for number in range(60):
        prompt = [bit for _ in range(4) for bit in [chance.randrange(2)] * 4]
        request = ask(str(number), [*prompt, *[7] * chance.randrange(5)])
        owed = [sum(left[i].values()) + uncached(request, i) for i in range(3)]
        best = min(owed)
        ties = [i for i in range(3) if owed[i] == best]
        longest = min(uncached(request, i) for i in ties)
        wanted = next(i for i in ties if uncached(request, i) == longest)
        cost = uncached(request, wanted)
        assert routed(request, loads) == wanted
        given[wanted].append(request)
        left[wanted][request.id] = cost
        for engine, load in enumerate(loads):
            for id in list(left[engine]):
                if chance.random() < 0.2:
                    del left[engine][id]
                    load.answered(id)


def test_no_engine() -> None:
    assert choose(ask("a", [1]), ()) is None
