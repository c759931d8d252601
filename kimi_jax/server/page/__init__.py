"""Serves the chat page at `/`: files of this folder, sent as they are, with headers that let nothing else run in it.

The page calls `/v1/chat/completions` as any client does. It is open without a key; its calls are not.
"""

from collections.abc import Awaitable, Callable
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_FILES = (
    "index.html",
    "chat.css",
    "main.js",
    "api.js",
    "answering.js",
    "conversation.js",
    "drawing.js",
    "elements.js",
    "markdown.js",
    "pictures.js",
    "tools.js",
)
# Each path of the page, with the name of its file.
PATHS = {"/" if name == "index.html" else f"/page/{name}": name for name in _FILES}

# Scripts and styles come from files of this server alone, and strings never become markup: the browser refuses them.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def handler(path: str) -> Callable[[Request], Awaitable[Response]]:
    """Returns the handler of one of `PATHS`, which answers with its file."""
    name = PATHS[path]
    content = resources.files(__package__).joinpath(name).read_bytes()
    media_type = _TYPES[name.rsplit(".", 1)[1]]

    async def send(request: Request) -> Response:
        return Response(content, headers=HEADERS, media_type=media_type)

    return send
