"""The requests: which view answers which, jobs as server-sent events, and the server itself on 127.0.0.1.

Nothing here knows what the views mean; nothing there knows of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from wherefrom.report.html import package_templates
from wherefrom.runtime.errors import InputError, StorageError, WherefromError, check_argument
from wherefrom.serve.guard import Guard
from wherefrom.serve.judgements import VERDICTS, Judgement
from wherefrom.serve.views import LONGEST_TEXT, RunViews
from wherefrom.serve.work import MOST_WAITING, Busy, Job, Tell, Worker

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_PAGE = ("index.html", "serve.css", "parts.js", "ask.js", "scores.js", "examples.js", "main.js")
_SHARED = ("report.css", "components.js")  # of the report page
_BUSY = (
    f"{MOST_WAITING} questions wait already, and one is being answered: ask again when one of them is done, or close "
    "a page that you do not need."
)


def make_app(views: RunViews, worker: Worker, token: str, port: int) -> ASGIApp:
    """All that can be asked, behind the guard."""
    routes = [
        *(Route("/" if name == "index.html" else f"/page/{name}", _file(name)) for name in (*_PAGE, *_SHARED)),
        Route("/api/run", _answering(lambda request: views.run())),
        Route("/api/scores", _answering(lambda request: views.scores())),
        Route("/api/scores/{name}", _answering(lambda request: views.result(request.path_params["name"]))),
        Route(
            "/api/scores/{name}/{query:int}",
            _answering(
                lambda request: views.hits(
                    request.path_params["name"], request.path_params["query"], _number(request, "k", 10)
                )
            ),
        ),
        Route("/api/examples", _answering(lambda request: _examples(views, request))),
        Route("/api/examples/{train:int}", _answering(lambda request: views.example(request.path_params["train"]))),
        Route("/api/judgements", _answering(lambda request: _judgements(views))),
        Route("/api/judgements", _judge(views), methods=["PUT"]),
        Route("/export/judgements.jsonl", _exported(lambda request: _export(views))),
        Route(
            "/export/filtered/{file:int}",
            _exported(lambda request: views.filtered(request.path_params["file"])),
        ),
        Route("/api/answer", _streamed(worker, lambda body: _answer(views, body)), methods=["POST"]),
        Route("/api/attribute", _streamed(worker, lambda body: _attribute(views, body)), methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), token, port)


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1 and no other address.

    Args:
        port: 0 is any that is free.

    Raises:
        InputError: the port is taken, or may not be used.
    """
    check_argument(0 <= port < 2**16, "port", port, "0 to 65535")
    found = socket.socket()
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(("127.0.0.1", port))
        found.listen()
    except OSError as error:
        found.close()
        raise InputError(f"port={port}: cannot be used ({error.strerror}); give another one, or 0 for any.") from error
    return found


def serve_page(views: RunViews, listening: socket.socket, ready: Callable[[str], None]) -> None:
    """Answer until a signal comes; a second one does not wait for what is under way.

    Args:
        listening: what `listen` has made.
        ready: is given the page's address, with the token that lets its reader ask, as soon as it can be opened.
    """
    port, token, worker = listening.getsockname()[1], secrets.token_urlsafe(32), Worker()
    config = uvicorn.Config(
        make_app(views, worker, token, port),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,  # addresses have the token, and texts
        server_header=False,
        proxy_headers=False,
        limit_concurrency=64,
        timeout_graceful_shutdown=2,
    )
    ready(f"http://127.0.0.1:{port}/?token={token}")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run([listening])
    finally:
        worker.close()
        listening.close()


# Plain answers


def _file(name: str) -> Callable[[Request], Response]:
    """One of the page's files, which the report page may share."""
    templates = package_templates()
    if name in _SHARED:
        content = templates.get_template(name).render()
    else:
        content = files("wherefrom.serve").joinpath("page", name).read_text(encoding="utf-8")
        if name == "index.html":  # which includes a part of the report page
            content = templates.from_string(content).render()
    kind = _KINDS[name.rpartition(".")[2]]
    return lambda request: Response(content, media_type=kind)


def _answering(view: Callable[[Request], object]) -> Callable[[Request], Response]:
    """A view's value as JSON, and errors in their own words."""

    def answer(request: Request) -> Response:
        try:
            return _json(view(request))
        except WherefromError as error:
            return _said(error)

    return answer


def _exported(view: Callable[[Request], tuple[str, bytes]]) -> Callable[[Request], Response]:
    """A file to be saved; its name has plain letters alone."""

    def answer(request: Request) -> Response:
        try:
            name, content = view(request)
        except WherefromError as error:
            return _said(error)
        plain = name.encode("ascii", "replace").decode().replace("?", "_")
        headers = {"content-disposition": f'attachment; filename="{plain}"'}
        return Response(content, media_type="application/octet-stream", headers=headers)

    return answer


def _json(value: object) -> Response:
    # Not JSONResponse's, which has no letters for halves of characters that texts may hold.
    return Response(json.dumps(value, allow_nan=False), media_type="application/json")


def _said(error: WherefromError) -> Response:
    status = HTTPStatus.BAD_REQUEST if isinstance(error, InputError) else HTTPStatus.CONFLICT
    return JSONResponse({"message": str(error)}, status)


def _examples(views: RunViews, request: Request) -> object:
    query = request.query_params
    verdict = query.get("verdict", "")
    check_argument(verdict in ("", "any", *VERDICTS), "verdict", verdict, f"any, {', '.join(VERDICTS)}")
    return views.examples(query.get("words", "")[:1000], query.get("source", ""), verdict, _number(request, "start", 0))


def _number(request: Request, name: str, default: int) -> int:
    said = request.query_params.get(name, str(default))
    check_argument(said.isascii() and said.isdigit() and len(said) < 16, name, said[:40], "a whole number")
    return int(said)


def _judgements(views: RunViews) -> object:
    return {"judgements": [asdict(each) for each in views.judgements.read().values()]}


def _export(views: RunViews) -> tuple[str, bytes]:
    """The judgements with their texts, one a line."""
    found = ({**views.example(each.train), **asdict(each)} for each in views.judgements.read().values())
    lines = [{name: value for name, value in each.items() if name != "excerpt"} for each in found]
    return "judgements.jsonl", "".join(json.dumps(each) + "\n" for each in lines).encode()


def _judge(views: RunViews) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        try:
            body = await _body(request)
            if views.read_only:
                raise StorageError("This server was started with --read-only: nothing is judged here.")
            judgement = Judgement(
                _part(body, "train", int),
                _part(body, "verdict", str, ""),
                _part(body, "note", str, ""),
            )
            await run_in_threadpool(views.judgements.judge, judgement)
            return _json(asdict(judgement))
        except WherefromError as error:
            return _said(error)

    return answer


# Jobs


class _Events(StreamingResponse):
    """A job's events as they come; when the browser goes away, the job ends."""

    def __init__(self, worker: Worker, job: Job, events: AsyncIterator[bytes]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._worker, self._job = worker, job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.leave(self._job)


def _streamed(worker: Worker, prepared: Callable[[dict[str, Any]], Callable[[Tell], None]]) -> Callable[[Request], Any]:
    """A job whose events are sent as they come.

    Args:
        prepared: makes the job of what was asked, or refuses it.
    """

    async def answer(request: Request) -> Response:
        loop, told = asyncio.get_running_loop(), asyncio.Queue[bytes | None]()

        def deliver(event: tuple[str, object] | None) -> None:
            # Written in the worker's thread, so that long texts do not keep other requests waiting.
            line = None if event is None else _event(*event)
            if not loop.is_closed():
                loop.call_soon_threadsafe(told.put_nowait, line)

        try:
            job = Job(prepared(await _body(request)), deliver)
            worker.submit(job)
        except WherefromError as error:
            return _said(error)
        except Busy:
            return JSONResponse({"message": _BUSY}, HTTPStatus.TOO_MANY_REQUESTS)

        async def events() -> AsyncIterator[bytes]:
            ahead, begun = 0, False
            while True:
                if ahead != (now := 0 if begun else worker.ahead(job)):
                    ahead = now
                    yield _event("waiting", {"ahead": ahead})
                try:
                    line = await asyncio.wait_for(told.get(), 1)
                except TimeoutError:
                    yield b": still here\n\n"
                    continue
                if line is None:
                    return
                begun = True
                if ahead:  # before what the job says: its last word comes last
                    ahead = 0
                    yield _event("waiting", {"ahead": 0})
                yield line

        return _Events(worker, job, events())

    return answer


def _event(name: str, said: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(said, allow_nan=False)}\n\n".encode()


def _answer(views: RunViews, body: dict[str, Any]) -> Callable[[Tell], None]:
    prompt = _text(body, "prompt")
    answer = None if body.get("answer") is None else _text(body, "answer")
    most, temperature = _part(body, "max_new_tokens", int, 64), float(_part(body, "temperature", (int, float), 0))
    seed = _part(body, "seed", int, 0)
    check_argument(0 <= seed < 2**31, "seed", seed, "0 to 2147483647")
    return lambda tell: views.answer(tell, prompt, answer, most, temperature, seed)


def _attribute(views: RunViews, body: dict[str, Any]) -> Callable[[Tell], None]:
    prompt, answer = _text(body, "prompt"), _text(body, "answer")
    said = body.get("span")
    fits = said is None or (isinstance(said, list) and len(said) == 2 and all(type(each) is int for each in said))
    check_argument(fits, "span", said, "where it begins and ends, in characters")
    span = None if said is None else (said[0], said[1])
    contrast = None if body.get("contrast") is None else _text(body, "contrast")
    group = None if body.get("group") is None else _text(body, "group")
    method, k = _part(body, "method", str, "ekfac"), _part(body, "k", int, 10)
    return lambda tell: views.attribute(tell, prompt, answer, span, contrast, method, group, k)


async def _body(request: Request) -> dict[str, Any]:
    """What a request's JSON says.

    Raises:
        InputError: it is none.
    """
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise InputError("The request is no JSON.") from error
    if not isinstance(found, dict):
        raise InputError("The request is no JSON object.")
    return found


def _part(body: dict[str, Any], name: str, kind: Any, default: Any = None) -> Any:
    found = body.get(name, default)
    if not isinstance(found, kind) or isinstance(found, bool):
        raise InputError(f"{name}: expected a {getattr(kind, '__name__', 'number')}.")
    return found


def _text(body: dict[str, Any], name: str) -> str:
    found: str = _part(body, name, str)
    if len(found) > LONGEST_TEXT:
        raise InputError(f"{name} has {len(found):,} characters; {LONGEST_TEXT:,} are the most.")
    try:
        found.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} has half of a character at {error.start}.") from error
    return found
