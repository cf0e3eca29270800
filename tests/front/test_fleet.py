"""Engines that do not start, start again as others, or are lost before they have begun."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from front.mortal_engine import MortalEngine, answer, ask
from front.test_replay import House, finish
from moebius.engine.client import EngineInfo, ExpertLoads, LayerLoad, StepOutput
from moebius.errors import EngineError, MoebiusError, OverloadError
from moebius.front.assignment import Room
from moebius.front.fleet import Lost
from moebius.front.outbox import Outbox
from moebius.front.replay import ReplayClient
from moebius.front.restarts import RestartBudget
from moebius.front.sums import add_loads
from moebius.request.finish import FinishReason


class Other(MortalEngine):
    """One that another model was loaded into."""

    @property
    def info(self) -> EngineInfo:
        return replace(super().info, fingerprint="fp_other")


def test_an_engine_that_would_answer_otherwise_is_refused() -> None:
    made: list[MortalEngine] = []
    reasons: list[MoebiusError] = []

    def launch(number: int, lost: Lost) -> MortalEngine:
        made.append((Other if made else MortalEngine)(number, lost))
        return made[-1]

    budget = RestartBudget(2)
    client = ReplayClient(launch, budget=budget, on_give_up=reasons.append)
    heard: list[StepOutput] = []
    client.start(heard.extend)
    client.submit(ask("a"))
    made[0].die()
    until(lambda: bool(reasons))
    assert "another fingerprint, fp_other" in str(reasons[0])
    assert heard[-1].finish_reason is FinishReason.ERROR
    assert all(each.closed for each in made[1:]) and not any(each.taken for each in made[1:])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_engine_that_is_lost_before_the_start_is_replaced() -> None:
    made: list[MortalEngine] = []

    def launch(number: int, lost: Lost) -> MortalEngine:
        made.append(MortalEngine(number, lost))
        return made[-1]

    client = ReplayClient(launch)
    client.submit(ask("a"))
    made[0].die()
    until(lambda: len(made) == 2)
    heard: list[StepOutput] = []
    client.start(heard.extend)
    until(lambda: bool(made[1].taken))
    while not heard or heard[-1].finish_reason is None:
        made[1].step()
    assert [token for step in heard for token in step.token_ids] == answer(ask("a"))


def test_what_is_lost_while_others_load_is_what_the_start_ends_with() -> None:
    """No engine is left, and none is started again."""
    made: list[MortalEngine] = []
    died = threading.Event()

    def launch(number: int, lost: Lost) -> MortalEngine:
        engine = MortalEngine(number, lost)
        made.append(engine)
        if number == 0:
            assert died.wait(10)
        else:
            engine.die()
            died.set()
        return engine

    with pytest.raises(EngineError, match="engine 1 was ended by its test"):
        ReplayClient(launch, 2)
    assert len(made) == 2 and all(each.closed for each in made)


def test_whatever_a_start_fails_with_is_counted() -> None:
    """Else nobody would start an engine again, and requests would wait for ever."""
    house = House(most_restarts=2)

    def no_files(number: int) -> None:
        raise OSError(24, "Too many open files")

    house.before_launch = no_files
    house.client.submit(ask("a"))
    house.engines[0].die()
    house.until(lambda: bool(house.reason))
    assert "2 times" in str(house.reason[0]) and house.ended("a") is not None


def test_what_waits_for_an_engine_is_bounded() -> None:
    gate = threading.Event()
    made: list[MortalEngine] = []

    def launch(number: int, lost: Lost) -> MortalEngine:
        if made:
            gate.wait(20)
        made.append(MortalEngine(number, lost))
        return made[-1]

    client = ReplayClient(launch, room=Room(requests=2))
    heard: list[StepOutput] = []
    client.start(heard.extend)
    made[0].die()
    for id in ("a", "bb", "ccc"):
        client.submit(ask(id))
    (refused,) = heard
    assert refused.request_id == "ccc" and isinstance(refused.error, OverloadError)
    assert "2 of 2 requests" in str(refused.error) and refused.error.retry_after > 1
    gate.set()
    until(lambda: len(made) == 2 and len(made[1].taken) == 2)
    client.close(1)


def test_an_engine_whose_queue_is_full_is_left_in_peace() -> None:
    """What it has refused it is given once one of its requests has ended, and not before."""
    house = House(most=3)
    requests = [ask("a", 3), ask("bb", 9), ask("ccc", 9)]
    for request in requests:
        house.client.submit(request)
    house.step()
    house.options = {"most": 1}
    house.engines[0].die()
    house.until(lambda: len(house.living()) == 1)
    house.until(lambda: all(house.ended(each.id) for each in requests))
    for request in requests:
        assert house.tokens(request.id) == answer(request)
    # Three at first; one is refused when another has ended.
    assert len(house.engines[1].taken) <= 6


class Silent(MortalEngine):
    """One that takes its time over its experts' loads."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked = threading.Event()
        self.released = threading.Event()

    def expert_loads(self) -> ExpertLoads:
        self.asked.set()
        self.released.wait(10)
        return ExpertLoads()


def test_asking_for_loads_holds_nobody_up() -> None:
    made: list[Silent] = []

    def launch(number: int, lost: Lost) -> Silent:
        made.append(Silent(number, lost))
        return made[-1]

    client = ReplayClient(launch)
    heard: list[StepOutput] = []
    client.start(heard.extend)
    asking = threading.Thread(target=client.expert_loads)
    asking.start()
    assert made[0].asked.wait(10)
    client.submit(ask("a", 1))
    made[0].step()
    assert heard[-1].finish_reason is FinishReason.LENGTH
    made[0].released.set()
    asking.join(10)


def test_loads_of_an_engine_that_has_not_answered_are_left_out() -> None:
    layer = LayerLoad(0, 1, 4, 1.0, 0.0, 0.5, (), (2, 2), (2, 2))
    known = ExpertLoads(4, (layer,))
    assert add_loads([ExpertLoads(), known]) == known
    assert add_loads([ExpertLoads()]) == ExpertLoads()


def counted(pairs: tuple[int, ...]) -> ExpertLoads:
    """Of an engine that has routed nothing but these pairs."""
    return ExpertLoads(5, (LayerLoad(3, 1, sum(pairs), 1.0, 0.0, 0.5, (), pairs, pairs),))


def test_totals_of_experts_loads_never_fall() -> None:
    """Not while the next engine loads, nor when it begins to count; the window is its own."""
    house = House()
    gate = threading.Event()
    house.before_launch = lambda number: bool(gate.wait(10)) and None
    for lost in range(2):
        engine = house.engines[lost]
        engine.expert_loads = lambda: counted((7, 1))  # type: ignore[method-assign]
        so_far = lost + 1
        (layer,) = house.client.expert_loads().layers
        assert layer.total_pairs == (7 * so_far, 1 * so_far)
        assert layer.pairs == (7, 1)
        engine.die()
        (layer,) = house.client.expert_loads().layers
        assert layer.total_pairs == (7 * so_far, 1 * so_far)
        assert layer.pairs == (0, 0) and layer.tokens == 0
        gate.set()
        house.until(lambda lost=lost: len(house.engines) == lost + 2)  # type: ignore[misc]
        house.until(lambda: house.client.stats().ready)


def test_what_a_reader_raises_over_ends_each_of_its_requests_once() -> None:
    house = House()
    raised = threading.Event()
    hear = house._hear

    def deliver(outputs: list[StepOutput]) -> None:
        if not raised.is_set():
            raised.set()
            raise ValueError("out of luck")
        hear(outputs)

    house.client._outbox.open(deliver)
    for request in (ask("last", 1), ask("more", 9)):
        house.client.submit(request)
    house.step()
    for id in ("last", "more"):
        last = house.ended(id)
        assert last is not None and isinstance(last.error, EngineError) and last.error.error_id
    house.step()
    assert not house.engines[0].rows
    house.client.submit(ask("after"))
    finish(house, ask("after"))


def test_outputs_come_in_their_order_from_one_thread_at_a_time() -> None:
    heard: list[int] = []
    busy = threading.Lock()

    def deliver(outputs: list[StepOutput]) -> None:
        assert busy.acquire(blocking=False), "two threads at once"
        heard.extend(token for output in outputs for token in output.token_ids)
        time.sleep(0.0002)
        busy.release()

    box = Outbox(lambda outputs, error: [])
    box.open(deliver)
    state = threading.Lock()
    number = 0

    def put() -> None:
        nonlocal number
        for _ in range(100):
            with state:
                box.put([StepOutput("a", (number,))])
                number += 1
            box.flush()

    threads = [threading.Thread(target=put) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    box.wait(10)
    assert heard == list(range(400))


def test_a_finished_request_renews_the_budget_and_a_refused_one_does_not() -> None:
    house = House(most_restarts=2, most=0)
    for i in range(3):
        house.client.submit(ask(f"r{i}"))
        house.step()
        last = house.ended(f"r{i}")
        assert last is not None and isinstance(last.error, OverloadError)
        house.living()[-1].die()
        house.until(lambda: bool(house.living()) or bool(house.reason))
    assert house.reason
