"""The live page's files: HTML, style and scripts, which hold nothing of this server.

They need no key, as a browser could not show one: the page asks for it, and has its figures from
the stream (live.py), which does need it.
"""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from moebius.server.methods import route

_FOLDER = Path(__file__).parent / "dashboard"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_NAMES = {
    "/": "page.html",
    **{f"/dashboard/{name}": name for name in ("page.css", "page.mjs", "figures.mjs", "icon.svg")},
}
PAGE_PATHS = frozenset(_NAMES)

# The page runs its own files and talks to its own server: nothing inline, nothing from elsewhere,
# in no frame, and no form of it goes anywhere.
_POLICY = (
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
)
_HEADERS = {
    "Content-Security-Policy": "; ".join(_POLICY),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """A route for each file, read once."""
    return [_served(path, _FOLDER / name) for path, name in _NAMES.items()]


def _served(path: str, file: Path) -> Route:
    body = file.read_bytes()
    headers = {**_HEADERS, "Content-Type": _KINDS[file.suffix]}

    async def answer(request: Request) -> Response:
        return Response(body, headers=headers)

    return route(path, answer)
