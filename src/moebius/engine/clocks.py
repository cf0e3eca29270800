"""Times of another host's clock. Two hosts' monotonic clocks began at different moments: a time
that crosses between them is moved by how much the receiver's clock shows more than the sender's
did, which counts what the frame was on its way."""

from collections.abc import Sequence
from dataclasses import replace

from msgspec import structs

from moebius.engine.client import EngineStats, StepOutput
from moebius.request.engine_request import EngineRequest


def move_request(request: EngineRequest, seconds: float) -> EngineRequest:
    deadline = request.deadline
    return replace(
        request,
        arrival=request.arrival + seconds,
        deadline=None if deadline is None else deadline + seconds,
    )


def move_outputs(outputs: Sequence[StepOutput], seconds: float) -> list[StepOutput]:
    return [
        structs.replace(
            output,
            at=output.at + seconds,
            scheduled=None if output.scheduled is None else output.scheduled + seconds,
        )
        for output in outputs
    ]


def move_stats(stats: EngineStats, now: float) -> EngineStats:
    """What another host's engine showed at its `stats.now`, as of `now` here."""
    return replace(stats, last_step=stats.last_step + now - stats.now, now=now)
