"""A request in flight, and all that it takes to ask for it again."""

from dataclasses import dataclass, field, replace

from msgspec import structs

from moebius.engine.client import StepOutput
from moebius.request.engine_request import EngineRequest

SUSPECT_AFTER = 2
"""So many engines lost while a request was in flight make it a suspect."""


@dataclass(slots=True, eq=False)
class Flight:
    """What a client has asked for, and what it has been told so far.

    request   as it was asked, which never changes
    emitted   token ids that the client has
    engine    the number of the engine that has the request; None while none has
    times_handed   how often an engine was given it
    losses    engines that were lost while they computed it, or for it
    recalled  its engine was told to end it, so that it can be asked for again later
    unwanted  its client has aborted it
    """

    request: EngineRequest
    emitted: list[int] = field(default_factory=list)
    engine: int | None = None
    times_handed: int = 0
    losses: int = 0
    recalled: bool = False
    unwanted: bool = False
    _num_scored: int = 0
    _scores_to_skip: int = 0
    _emitted_at_loss: int = 0
    _preemptions: int = 0
    _preemptions_before: int = 0
    _cached: int | None = None
    _scheduled: float | None = None

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_tokens(self) -> int:
        """Those that an engine has to hold of it when it takes it."""
        return self.request.num_tokens + len(self.emitted)

    @property
    def replayed(self) -> bool:
        """It was asked for again."""
        return self.times_handed > 1

    @property
    def suspect(self) -> bool:
        """Engines were lost with it more often than chance has it."""
        return self.losses >= SUSPECT_AFTER

    @property
    def past_its_loss(self) -> bool:
        """It came further than where its last engine was lost."""
        return len(self.emitted) > self._emitted_at_loss

    def ask(self) -> EngineRequest:
        """What an engine has to be asked for now: what was emitted is given, not drawn again."""
        if not self.emitted:
            return self.request
        given = (*self.request.output_ids, *self.emitted)
        return replace(self.request, output_ids=given)

    def handed(self, engine: int) -> None:
        """An engine has it now, which will score the whole prompt."""
        self.engine = engine
        self.times_handed += 1
        self._scores_to_skip = self._num_scored

    def told(self, output: StepOutput) -> StepOutput:
        """Take what its engine says of it; the same as its client is to hear it.

        Where the request was asked for again, what its client knows already is left out, and how it
        was first received stays: when it was scheduled, and what it found in the prefix cache.
        """
        self.emitted += output.token_ids
        self._preemptions = output.num_preemptions
        if self._cached is None and output.token_ids:
            self._cached = output.num_cached_tokens
        if self._scheduled is None:
            self._scheduled = output.scheduled
        if self.replayed:
            output = self._still_unknown(output)
        self._num_scored += len(output.prompt_logprobs)
        return output

    def taken_back(self) -> None:
        """No engine has it any more; the next one begins where this one was."""
        self.engine = None
        self.recalled = False
        self._preemptions_before += self._preemptions
        self._preemptions = 0

    def took_part_in_a_loss(self) -> None:
        """An engine is gone that may have computed it, or for it."""
        self.losses += 1
        self._emitted_at_loss = len(self.emitted)

    def cleared(self) -> None:
        """It is not what ended its engines, or not at that place; another loss will tell."""
        self.losses = SUSPECT_AFTER - 1

    def _still_unknown(self, output: StepOutput) -> StepOutput:
        known = min(self._scores_to_skip, len(output.prompt_logprobs))
        self._scores_to_skip -= known
        return structs.replace(
            output,
            prompt_logprobs=output.prompt_logprobs[known:],
            num_cached_tokens=self._cached or 0,
            scheduled=self._scheduled,
            num_preemptions=self._preemptions_before + output.num_preemptions,
        )
