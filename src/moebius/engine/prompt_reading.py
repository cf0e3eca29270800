"""What of a step's chunks an encoder reads: whole prompts, which are no rows of the decoder's."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moebius.nn.mixers.source_past import with_sources
from moebius.ops.steps import StepInputs
from moebius.schedule.request import Request
from moebius.schedule.scheduler import Chunk


@dataclass(slots=True)
class PromptReading:
    """prompts, tables: of the requests whose encoder runs in the step. lengths: of the prompts of
    all requests that the decoder computes for."""

    prompts: list[list[int]] = field(default_factory=list)
    tables: "list[array[int]]" = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def join(self, step: StepInputs, block_size: int) -> None:
        """Let the decoder's step have what the encoder reads."""
        with_sources(step, self.prompts, self.tables, self.lengths, block_size)


def read_by_encoder(
    chunks: Sequence[Chunk], requests: Mapping[str, Request]
) -> tuple[PromptReading | None, Sequence[Chunk]]:
    """What an encoder reads of these chunks, and what is left of them for the decoder; None and all
    of them where there is no encoder."""
    if not chunks or not requests[chunks[0].request_id].source:
        return None, chunks
    reading = PromptReading()
    left = []
    for chunk in chunks:
        request = requests[chunk.request_id]
        start = max(chunk.start, request.source)
        if chunk.start < request.source:
            assert chunk.start == 0 and chunk.end >= request.source, "a prompt is read at once"
            reading.prompts.append(request.tokens(0, request.source))
            reading.tables.append(chunk.tables[0])
        if start < chunk.end:
            left.append(chunk._replace(start=start, num_tokens=chunk.end - start))
            reading.lengths.append(request.source)
    return reading, left
