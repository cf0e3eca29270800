"""Every scheduling decision as JSON lines, and the replay that makes the decisions again and
compares.

Token ids are renamed to numbers in order of first sight. The scheduler only ever asks whether two
ids are equal, so its decisions are the same under any one-to-one renaming, and a trace does not
spell out prompts.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from moebius.errors import ConfigError, StorageError
from moebius.files import begins_with, check_target
from moebius.request.engine_request import EngineRequest
from moebius.request.finish import FinishReason
from moebius.request.params import SamplingParams
from moebius.request.share import Share
from moebius.schedule.blocks import BlockPool
from moebius.schedule.config import SchedulerConfig
from moebius.schedule.drafts import DraftingScheduler, StepCosts
from moebius.schedule.groups import CacheGroups, GroupSpec, StateSpec
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Chunk, StepPlan
from moebius.schedule.tiered_drafts import TieredDraftingScheduler
from moebius.schedule.tiers import Piece, TieredScheduler

VERSION = 8
_OUR_TRACES = begins_with(b'{"event":"start","version":')
_POOL = ("num_blocks", "block_size", "enable_prefix_caching")
_REQUEST = ("id", "max_tokens", "arrival", "priority", "deadline", "generation_start")
"""Fields that a trace holds as they are; the others are renamed or shortened."""


class TraceWriter:
    """Writes the calls that a scheduler gets, and the plans it answers with; one line each, flushed
    a step."""

    def __init__(self, path: str | Path, config: SchedulerConfig, pool: BlockPool) -> None:
        """Raises ConfigError where the file holds something else, StorageError where it cannot be
        written."""
        check_target(Path(path), _OUR_TRACES)
        try:
            self._file: IO[str] = Path(path).open("w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise StorageError(f"--trace {path} cannot be written: {error.strerror}") from error
        self._names: dict[int, int] = {}
        self._owners: dict[str, int] = {}
        sizes = {name: getattr(pool, name) for name in _POOL}
        groups = asdict(pool.groups)
        options = {field.name: getattr(config, field.name) for field in fields(SchedulerConfig)}
        self._write(event="start", version=VERSION, scheduler=options, pool=sizes, groups=groups)

    def drafting(self, scheduler: DraftingScheduler) -> None:
        """Before anything else: by which costs it drafts."""
        self._write(event="drafting", costs=scheduler.costs.measured, most_rows=scheduler.most_rows)

    def add(self, request: Request) -> None:
        params = request.params
        self._write(
            event="add",
            **{name: getattr(request.asked, name) for name in _REQUEST},
            prompt=self._rename(request.asked.prompt_ids),
            start=self._rename(request.start_ids),
            output=self._rename(request.output_ids),
            stop=self._rename(sorted(request.stop_ids)),
            min_tokens=params.min_tokens,
            prompt_logprobs=params.prompt_logprobs is not None,
            salt=self._salt_name(request.asked.salt),
            share=[self._owner_name(request.asked.share.account), request.asked.share.weight],
        )

    def plan(self, now: float, plan: StepPlan) -> None:
        self._write(event="plan", now=now, **plan_record(plan, self._rename))

    def following(self) -> None:
        self._write(event="following")

    def update(self, tokens: Mapping[str, Sequence[int]]) -> None:
        self._write(event="update", tokens={id: self._rename(ids) for id, ids in tokens.items()})
        self._file.flush()

    def rollback(self) -> None:
        self._write(event="rollback")

    def abort(self, request_id: str, reason: FinishReason) -> None:
        self._write(event="abort", id=request_id, reason=reason.value)

    def fail(self, request_id: str) -> None:
        self._write(event="fail", id=request_id)

    def expect(self, request_id: str, until: float) -> None:
        self._write(event="expect", id=request_id, until=until)

    def land(self, request_id: str, piece: Piece) -> None:
        self._write(event="land", id=request_id, piece=piece)

    def settle(self, request_id: str) -> None:
        self._write(event="settle", id=request_id)

    def close(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        """Close after a failure; what could not be written is lost."""
        with suppress(OSError, ValueError):
            self._file.close()

    def _write(self, **record: Any) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")

    def _rename(self, ids: Iterable[int]) -> list[int]:
        return [self._names.setdefault(token, len(self._names)) for token in ids]

    def _owner_name(self, account: str) -> str:
        return str(self._owners.setdefault(account, len(self._owners))) if account else ""

    def _salt_name(self, salt: bytes) -> int:
        # Negative keys keep salts apart from token ids in the one table of names.
        return (
            self._names.setdefault(-1 - int.from_bytes(b"\x01" + salt, "big"), len(self._names))
            if salt
            else -1
        )


def plan_record(
    plan: StepPlan, named: Callable[[Iterable[int]], list[int]] = list
) -> dict[str, Any]:
    """A plan as JSON types: what two runs of the same decisions have in common to the last block
    id. named: what token ids are called."""
    return {
        "step": plan.step,
        "chunks": [[*_chunk_record(chunk), named(chunk.drafts)] for chunk in plan.chunks],
        "preempted": list(plan.preempted),
        "expired": list(plan.expired),
        "waiting": dict(plan.waiting),
    }


def _chunk_record(chunk: Chunk) -> list[Any]:
    states = chunk.states
    return [
        chunk.request_id,
        chunk.start,
        chunk.num_tokens,
        chunk.samples,
        [list(table) for table in chunk.tables],
        None if states is None else [states.slot, *states.scratch, states.restore, states.save],
    ]


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """steps compared; `difference` describes the first plan that came out otherwise, None when all
    were the same."""

    steps: int
    requests: int
    difference: str | None = None


def replay(path: str | Path) -> ReplayReport:
    """Make the decisions of a trace again, with the scheduler of this version.

    A last line cut short by a crash ends the replay; anything else that is not a trace is a
    ConfigError.
    """
    lines = _records(Path(path))
    try:
        return _replay(lines, path)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{path}: a line is not as this version writes it, or not after what it needs ({what})"
        ) from error


def _replay(lines: Iterator[dict[str, Any]], path: str | Path) -> ReplayReport:
    scheduler = _scheduler(next(lines, None), path)
    steps = requests = 0
    plan: StepPlan | None = None
    for record in lines:
        match record["event"]:
            case "drafting":
                scheduler = _drafting(scheduler, record)
            case "add":
                scheduler.add(_request(record))
                requests += 1
            case "plan":
                plan = scheduler.plan(record["now"])
                steps += 1
                difference = _difference(plan, record)
                if difference is not None:
                    return ReplayReport(steps, requests, difference)
            case "following" | "update" | "rollback" if plan is not None:
                _go_on(scheduler, plan, record)
            case "abort":
                scheduler.abort(record["id"], FinishReason(record["reason"]))
            case "fail":
                scheduler.fail(record["id"])
            case "expect" | "land" | "settle":
                _fetch(scheduler, record)
            case other:
                raise ConfigError(
                    f"{path}: a line with the event {other!r} where none of the kind can stand"
                )
    return ReplayReport(steps, requests)


def _go_on(scheduler: TieredScheduler, plan: StepPlan, record: dict[str, Any]) -> None:
    """What became of a plan."""
    match record["event"]:
        case "following":
            scheduler.following(plan)
        case "update":
            scheduler.update(plan, record["tokens"])
        case "rollback":
            scheduler.rollback(plan)


def _fetch(scheduler: TieredScheduler, record: dict[str, Any]) -> None:
    """What a second tier of the prefix cache did between two steps."""
    match record["event"]:
        case "expect":
            scheduler.expect(record["id"], record["until"])
        case "land":
            scheduler.land(record["id"], Piece(*record["piece"]), lambda place: None)
        case "settle":
            scheduler.settle(record["id"])


def _difference(plan: StepPlan, record: dict[str, Any]) -> str | None:
    for key, value in plan_record(plan).items():
        if record[key] != value:
            return f"step {plan.step}: {key} was {record[key]}, now it is {value}"
    return None


def _drafting(scheduler: TieredScheduler, record: dict[str, Any]) -> TieredScheduler:
    """The scheduler, by the costs of the machine that the trace is of."""
    costs = StepCosts([(rows, cost) for rows, cost in record["costs"]])
    return TieredDraftingScheduler(scheduler.config, scheduler.pool, costs, record["most_rows"])


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{path} cannot be read as a trace: {reason}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} cannot be read as a trace: it is no UTF-8 text") from error
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines) and isinstance(error, json.JSONDecodeError):
                return
            where = f"{path}, line {number}"
            raise ConfigError(
                f"{where}: not JSON ({error}); is this a file that --trace wrote?"
            ) from error
        if not isinstance(record, dict) or "event" not in record:
            raise ConfigError(
                f"{path}, line {number}: no trace event; is this a file that --trace wrote?"
            )
        yield record


def _scheduler(start: dict[str, Any] | None, path: str | Path) -> TieredScheduler:
    if start is None or start["event"] != "start" or start.get("version") != VERSION:
        raise ConfigError(
            f"{path} does not begin with the start line of a trace of version {VERSION}"
        )
    groups = start["groups"]
    cache = CacheGroups(
        tuple(GroupSpec(**spec) for spec in groups["blocks"]),
        None if groups["states"] is None else StateSpec(**groups["states"]),
    )
    pool = BlockPool(**start["pool"], groups=cache, key=bytes(32))
    return TieredScheduler(SchedulerConfig(**start["scheduler"]), pool)


def _request(record: dict[str, Any]) -> Request:
    params = SamplingParams(
        max_tokens=None,
        min_tokens=record["min_tokens"],
        prompt_logprobs=0 if record["prompt_logprobs"] else None,
    )
    asked = EngineRequest(
        **{name: record[name] for name in _REQUEST},
        prompt_ids=tuple(record["prompt"]),
        params=params,
        seed=0,
        stop_ids=frozenset(record["stop"]),
        salt=b"" if record["salt"] < 0 else str(record["salt"]).encode(),
        share=Share(*record["share"]),
        output_ids=tuple(record["output"]),
    )
    return Request(asked, tuple(record["start"]))
