"""Whose request the event loop reads next."""

import asyncio
import contextvars
from collections import OrderedDict, deque


class ReadingTurns:
    """Requests that came at the same time are read and handed over in turns between keys, one in
    each round of the event loop, as long as others wait.

    Reading a request takes a millisecond or two. Without turns, one that comes while a crowd of
    another key's is being read would wait for the whole crowd; and what has ended meanwhile, as
    outputs of the engine, would, too.
    """

    def __init__(self) -> None:
        # What passes turns on runs in no request's context.
        self._context = contextvars.copy_context()
        self._taken = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def take(self, account: str) -> None:
        """Return when it is the turn of a request of this account's."""
        if not self._taken:
            self._pass_on_later()
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(account, deque()).append(turn)
        await turn

    def _pass_on_later(self) -> None:
        asyncio.get_running_loop().call_soon(self._pass_on, context=self._context)
        self._taken = True

    def _pass_on(self) -> None:
        """Give this round's turn to the account whose last one is the longest ago."""
        turn = self._next()
        if turn is None:
            self._taken = False
        else:
            turn.set_result(None)
            self._pass_on_later()

    def _next(self) -> asyncio.Future[None] | None:
        while self._waiting:
            account, turns = self._waiting.popitem(last=False)
            turn = turns.popleft()
            if turns:
                self._waiting[account] = turns
            if not turn.done():  # or its client has left
                return turn
        return None
