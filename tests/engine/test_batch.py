"""A plan becomes a step: which slots and tables each group of layers gets, and what states do."""

from __future__ import annotations

from pathlib import Path

from moebius.engine.batch import build_batch
from moebius.engine.trace import TraceWriter, replay
from moebius.engine.workspace import StepRows
from moebius.ops.steps import StateInputs, StepInputs
from moebius.schedule.groups import CacheGroups, GroupSpec, StateSpec
from schedule.making import make_request, make_scheduler, step

GROUPS = CacheGroups((GroupSpec(), GroupSpec(4)), StateSpec(9, scratch=1, interval=2))


def test_each_group_has_slots_and_a_table_of_its_own() -> None:
    step_ = StepInputs.build(
        [[7, 8, 9], [5]],
        [3, 4],
        [[4, 1, 6], [0, 2, 3]],
        2,
        others=[[[-1, 9, 8], [-1, 5, 7]]],
    )
    other = step_.of(1)
    assert step_.of(0) is step_ and other.group == 1
    assert list(step_.slot_mapping_host) == [3, 12, 13, 6]
    assert list(other.slot_mapping_host) == [19, 16, 17, 14]
    assert step_.block_table.tolist() == [[4, 1, 6], [0, 2, 3]]
    assert other.block_table.tolist() == [[-1, 9, 8], [-1, 5, 7]]
    for name in ("input_ids_host", "positions_host", "query_start_host", "seq_lens_host"):
        assert getattr(other, name) is getattr(step_, name)


def test_tables_of_unequal_lengths_are_filled_up() -> None:
    built = StepInputs.build([[1], [2]], [4, 0], [[3, 1, 2], [5]], 2)
    assert built.block_table.tolist() == [[3, 1, 2], [5, 0, 0]] and built.max_blocks == 3


def test_a_plan_says_what_happens_to_states() -> None:
    scheduler = make_scheduler(size=2, groups=GROUPS, budget=64)
    scheduler.add(make_request("a", range(1, 8), max_tokens=9))
    for _ in range(3):  # to the boundaries at 4 and 6, then to the first token
        step(scheduler)
    scheduler.add(make_request("b", range(1, 8), max_tokens=9, arrival=1.0))
    scheduler.add(make_request("c", [50], max_tokens=9, arrival=2.0))
    plan = scheduler.plan(0.0)
    chunks = {chunk.request_id: chunk for chunk in plan.chunks}
    slots = {name: chunk.states.slot for name, chunk in chunks.items()}
    inputs = build_batch(plan, scheduler.requests, 2).inputs
    assert inputs.states == StateInputs(
        slots=[slots["a"], slots["b"], slots["c"]],
        cleared=[slots["c"]],
        restores=[(chunks["b"].states.restore, slots["b"])],
        saves=[(slots["a"], chunks["a"].states.save)],
    )
    assert chunks["b"].start == 6 and chunks["a"].end == 8
    for group in range(2):
        tables = inputs.of(group).block_table.tolist()
        for row, chunk in zip(tables, plan.chunks, strict=True):
            assert row[: len(chunk.tables[group])] == chunk.tables[group].tolist()
    assert build_batch(plan, scheduler.requests, 2).inputs.of(1).block_table[0, 0] == -1


def test_a_model_of_states_alone_has_no_table_and_no_slots() -> None:
    """Its tokens, positions and lengths are those of a model with tables; its states are served."""
    groups = CacheGroups((), StateSpec(9, interval=2))
    scheduler = make_scheduler(size=2, seqs=4, groups=groups, budget=4)
    scheduler.add(make_request("a", [7, 8, 9], max_tokens=9))
    step(scheduler)
    scheduler.add(make_request("b", [5, 6, 7, 8], max_tokens=9, arrival=1.0))
    plan = scheduler.plan(0.0)
    inputs = build_batch(plan, scheduler.requests, 2).inputs
    ends = [chunk.end for chunk in plan.chunks]
    assert ends == [3, 2] and inputs.seq_lens_host.tolist() == ends
    assert inputs.input_ids_host.tolist() == [9, 5, 6]
    assert inputs.positions_host.tolist() == [2, 0, 1]
    assert inputs.query_start_host.tolist() == [0, 1, 3]
    assert not inputs.slot_mapping_host and not inputs.others
    assert inputs.block_table.shape == (2, 0)
    slots = [chunk.states.slot for chunk in plan.chunks]
    assert inputs.states.slots == slots and inputs.states.cleared == slots[1:]
    columns = StepRows(8, 8).step_source(0).arrays(inputs)
    assert columns == [inputs.input_ids_host, inputs.positions_host]


def test_a_trace_of_groups_and_states_replays_to_the_same_decisions(tmp_path: Path) -> None:
    scheduler = make_scheduler(blocks=24, size=2, seqs=3, length=40, groups=GROUPS)
    trace = TraceWriter(tmp_path / "trace.jsonl", scheduler.config, scheduler.pool)
    for i, name in enumerate("abcd"):
        request = make_request(
            name, range(1, 9 + i), max_tokens=12, arrival=float(i), generation_start=3 + i
        )
        scheduler.add(request)
        trace.add(request)
    failed = False
    while scheduler.has_work:
        plan = scheduler.plan(0.0)
        trace.plan(0.0, plan)
        if plan.step == 4:
            failed = True
            scheduler.rollback(plan)
            trace.rollback()
            continue
        tokens = {chunk.request_id: [5] for chunk in plan.chunks if chunk.samples}
        scheduler.update(plan, tokens)
        trace.update(tokens)
    trace.close()
    report = replay(tmp_path / "trace.jsonl")
    assert failed and report.difference is None and report.requests == 4 and report.steps > 12
    text = (tmp_path / "trace.jsonl").read_text()
    assert '"groups":{"blocks":[{"window":null},{"window":4}],"states":{"num_slots":9' in text
    for old, new in (
        ('{"window":4}', '{"window":8}'),
        ('"generation_start":3', '"generation_start":6'),
    ):
        (tmp_path / "other.jsonl").write_text(text.replace(old, new, 1))
        assert replay(tmp_path / "other.jsonl").difference is not None
