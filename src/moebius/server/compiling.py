"""Grammars are checked beside the event loop, on few threads, and for a bounded time."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from moebius.errors import OverloadError
from moebius.request.structured import StructuredOutput
from moebius.text.grammar import CheckedGrammar, checked_grammar

MOST_SECONDS = 5.0
_THREADS = 2
_MOST_WAITING = 32


class GrammarDesk:
    """Where calls wait for their grammars to be checked.

    A thread cannot be stopped: where a check takes longer than its call waits, it goes on, and its
    thread serves nobody meanwhile. So few wait at a time, and the others are told to come again.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="compile")
        self._waiting = 0

    async def checked(
        self, wanted: StructuredOutput, seconds: float = MOST_SECONDS
    ) -> CheckedGrammar:
        """RequestError for what is no grammar, or takes over `seconds`; OverloadError where too
        many wait."""
        if self._waiting >= _MOST_WAITING:
            raise OverloadError(f"{self._waiting} grammars wait to be compiled; try again later")
        loop = asyncio.get_running_loop()
        self._waiting += 1
        check = loop.run_in_executor(self._pool, checked_grammar, wanted)
        check.add_done_callback(self._done)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(check)
        except TimeoutError:
            raise wanted.error(
                f"{wanted.param} takes over {seconds:g} s to compile; make it simpler"
            ) from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _done(self, check: "asyncio.Future[CheckedGrammar]") -> None:
        self._waiting -= 1
        if not check.cancelled():
            check.exception()  # else asyncio complains where nobody waits any more
