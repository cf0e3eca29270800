"""Which of several engines a request goes to.

The one with the fewest tokens left to compute before the request's first one: those of requests
that have none yet, and its own that are not in that engine's prefix cache. Of equal ones that with
the longer cached prefix, then the lowest number.

What an engine caches is followed from here, by the prefix hashes of the prompts that it was given:
it may have evicted some of them, which costs a wrong choice some time and nothing else.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from moebius.request.engine_request import EngineRequest


@dataclass(slots=True)
class EngineLoad:
    """One engine, as far as routing knows it. `num_blocks`, `block_size`: of its cache."""

    num_blocks: int
    block_size: int
    tokens: int = 0
    _owed: dict[str, int] = field(default_factory=dict)
    _cached: OrderedDict[bytes, None] = field(default_factory=OrderedDict)

    def cached_tokens(self, request: EngineRequest) -> int:
        """Leading tokens of a prompt that are most likely in its cache; the last one never is."""
        hashes = () if request.prompt_hashes is None else request.prompt_hashes.hashes
        found = 0
        for digest in hashes:
            if digest not in self._cached:
                break
            found += self.block_size
        return min(found, len(request.prompt_ids) - 1)

    def owes(self, request: EngineRequest) -> int:
        """Tokens before the request's next one, if it came here now."""
        length = len(request.prompt_ids) + len(request.output_ids)
        return self.tokens + length - self.cached_tokens(request)

    def give(self, request: EngineRequest) -> None:
        """It has the request."""
        owed = self.owes(request) - self.tokens
        self._owed[request.id] = owed
        self.tokens += owed
        if request.prompt_hashes is not None:
            for digest in request.prompt_hashes.hashes:
                self._cached[digest] = None
                self._cached.move_to_end(digest)
        while len(self._cached) > self.num_blocks:
            self._cached.popitem(last=False)

    def answered(self, request_id: str) -> None:
        """The request has its first token, or is there no more."""
        self.tokens -= self._owed.pop(request_id, 0)


def choose(request: EngineRequest, loads: Iterable[tuple[int, EngineLoad]]) -> int | None:
    """The number of the engine that shall have the request; None where there is none."""
    ranked = [(load.owes(request), -load.cached_tokens(request), number) for number, load in loads]
    return min(ranked)[2] if ranked else None
