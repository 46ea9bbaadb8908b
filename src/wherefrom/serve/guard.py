"""Who may ask: the browser of the person who has started the server, and pages that the server itself has sent.

A server on 127.0.0.1 can be reached by every page that a browser shows and by every program on the machine. So each
request has to bring the token that the command has printed, name this server as its host (or a stranger's domain that
is pointed at 127.0.0.1 would be taken for it), and come from a page of this origin. What is sent may load nothing from
elsewhere, run no script but the page's files, and make no text into HTML. This module knows no run and no scores.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 2**18  # of what is asked

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS: Mapping[str, str] = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
_CHANGING = ("POST", "PUT")


class Guard:
    """Refuses what may not ask, before anything looks at it, and puts the headers of this module on every answer.

    Args:
        app: what may be asked.
        token: what the address that the command prints has, and then a cookie.
        port: where the server listens, on 127.0.0.1.
    """

    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app, self._token = app, token
        self._hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
        self._cookie = f"wherefrom-{port}"  # a browser sends cookies to every port of a host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a WebSocket, which is closed
        headers = Headers(scope=scope)
        refused = self._refused(scope, headers)
        given = self._given(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answered = MutableHeaders(scope=message)
                answered.update(HEADERS)
                if given and not refused:
                    answered.append("set-cookie", f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        app = PlainTextResponse(refused[1], refused[0]) if refused else self._app
        await app(scope, receive, guarded)

    def _refused(self, scope: Scope, headers: Headers) -> tuple[HTTPStatus, str] | None:
        """With which status, and in which words; None for what may ask."""
        host, changing = headers.getlist("host"), scope["method"] in _CHANGING
        if len(host) != 1 or host[0] not in self._hosts:
            return HTTPStatus.MISDIRECTED_REQUEST, f"This server is called {self._hosts[0]}."
        origin = headers.get("origin", "" if changing else f"http://{host[0]}")
        site = headers.get("sec-fetch-site", "none")
        if origin != f"http://{host[0]}" or (site not in ("same-origin", "none") and not self._given(scope)):
            return HTTPStatus.FORBIDDEN, "Only this server's own page may ask it."
        if not (self._given(scope) or self._has_cookie(headers)):
            return HTTPStatus.UNAUTHORIZED, "Open the address that `wherefrom serve` has printed: it has a token."
        if changing:
            length = headers.get("content-length", "")
            if headers.get("content-type") != "application/json" or not length.isascii() or not length.isdigit():
                return HTTPStatus.BAD_REQUEST, "Expected JSON whose length is known."
            if int(length[:20]) > MOST_BYTES:
                return HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"That is too long: {MOST_BYTES:,} bytes are the most."
        return None

    def _given(self, scope: Scope) -> bool:
        """Whether this opens the page with the token in its address."""
        found = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
        return scope["path"] == "/" and scope["method"] == "GET" and len(found) == 1 and self._same(found[0])

    def _has_cookie(self, headers: Headers) -> bool:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return False
        return found is not None and self._same(found.value)

    def _same(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self._token.encode())
