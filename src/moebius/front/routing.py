"""Which of several engines a request goes to.

The one with the fewest tokens left to compute before the request's first one: those of requests
that have none yet, and its own that are not in that engine's prefix cache. Of equal ones that with
the longer cached prefix, then the lowest number.

What an engine has left is followed from here. A prompt counts whole until its first token comes,
however much of it is computed by then. What is cached is known by the prefix hashes of the prompts
that it was given: it may have evicted others of them. Either costs a wrong choice some time and
nothing else.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile

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
        """Leading tokens of a prompt that it will most likely find in its cache, as
        BlockPool.match: in whole blocks, never the last token, and none where all are scored."""
        if request.prompt_hashes is None or request.params.prompt_logprobs is not None:
            return 0
        found = takewhile(self._cached.__contains__, request.prompt_hashes.hashes)
        readable = (request.num_tokens - 1) // self.block_size
        return min(len(list(found)), readable) * self.block_size

    def owes(self, request: EngineRequest) -> int:
        """Tokens before the request's next one, if it came here now."""
        return self.tokens + request.num_tokens - self.cached_tokens(request)

    def give(self, request: EngineRequest) -> None:
        """It has the request."""
        owed = self.owes(request) - self.tokens
        self._owed[request.id] = owed
        self.tokens += owed
        if request.prompt_hashes is not None:
            for digest in reversed(request.prompt_hashes.hashes):  # evicted from its end
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
