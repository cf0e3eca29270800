"""The engine that a request waits the shortest time at."""

from __future__ import annotations

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
    # 0 owes 8 of its own, 1 owes 4 others and 8 - 7 of its own: make them equal.
    loads[0].give(ask("c", [80]))
    loads[0].answered("c")
    request = ask("d", prompt)
    loads[1].give(ask("e", [90, 91, 92]))
    assert [load.owes(request) for load in loads] == [8, 8]
    assert choose(request, enumerate(loads)) == 1


def test_the_last_token_is_computed_and_a_replay_owes_its_output() -> None:
    load = EngineLoad(100, 4)
    load.give(ask("a", list(range(1, 9))))
    load.answered("a")
    assert load.owes(ask("b", list(range(1, 9)))) == 1
    assert load.owes(ask("c", list(range(1, 9)), output=(5, 6, 7))) == 4


def test_no_more_blocks_are_remembered_than_there_are() -> None:
    load = EngineLoad(2, 4)
    load.give(ask("a", list(range(1, 13))))
    load.give(ask("b", [50] * 4))
    assert load.cached_tokens(ask("c", list(range(1, 13)))) == 0
    assert load.cached_tokens(ask("d", [50] * 8)) == 4


def test_no_engine() -> None:
    assert choose(ask("a", [1]), ()) is None
