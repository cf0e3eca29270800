"""HEAD and OPTIONS on every route, for whoever asks whether it is there and what it takes."""

from collections.abc import Awaitable, Callable, Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Handler = Callable[[Request], Awaitable[Response]]


def route(path: str, handler: Handler, methods: Iterable[str] = ("GET",)) -> Route:
    """A route that answers `methods` by its handler, OPTIONS with the methods that there are, and
    HEAD as GET, without the body; where there is no GET it says only that the route is there.

    A preflight of a web page never comes here: see cors.py.
    """
    own = set(methods)
    if "GET" in own:
        own.add("HEAD")
    every = sorted(own | {"HEAD", "OPTIONS"})

    async def answer(request: Request) -> Response:
        if request.method in own:
            return await handler(request)
        status = 204 if request.method == "OPTIONS" else 200
        return Response(status_code=status, headers={"Allow": ", ".join(every)})

    return Route(path, answer, methods=every)
