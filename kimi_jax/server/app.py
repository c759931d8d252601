"""The application: its state, its paths, and the handler of each."""

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from kimi_jax.printable import printable
from kimi_jax.server import anthropic_answer, anthropic_request, openai_answer, openai_request, page, responses_request
from kimi_jax.server.anthropic_schema import CountRequest, MessagesRequest
from kimi_jax.server.backend import Backend
from kimi_jax.server.body import read_body
from kimi_jax.server.errors import RequestError, failed, invalid, unavailable
from kimi_jax.server.gate import Gate, Limits, style
from kimi_jax.server.generation import Chat, SamplingMode, prepare, write_prompt
from kimi_jax.server.masks import Masks
from kimi_jax.server.media_fetch import PictureFetcher
from kimi_jax.server.metrics import TYPE, Metrics
from kimi_jax.server.openai_schema import ChatRequest, CompletionRequest, TemplateOptions, TokenizeRequest
from kimi_jax.server.responses_answer import Response as ResponseAnswer
from kimi_jax.server.responses_schema import ResponsesRequest
from kimi_jax.server.run import Run
from kimi_jax.server.watched import ClientGoneError, EventStream, disconnected, until_gone
from kimi_jax.text import chat

log = logging.getLogger("kimi_jax.server")
_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_Handler = Callable[[Request], Awaitable[Any]]
_encode = msgspec.json.Encoder().encode


class Service:
    """Holds what the handlers share: the model's names, limits, metrics, and the backend once it is loaded (`ready`).

    names: under which clients may ask for the model, the first of them in answers.
    """

    def __init__(self, names: Sequence[str], limits: Limits | None = None, sampling: SamplingMode = "open"):
        self.names, self.limits, self.sampling = tuple(names), limits or Limits(), sampling
        self.metrics = Metrics(lambda: None if self._backend is None else self._backend.stats())
        self.pictures = PictureFetcher(self.limits.media_domains)
        self.stopping = False
        self._lost = False
        self.created = int(time.time())
        self._backend: Backend | None = None
        self._masks: Masks | None = None
        self._thinks = False

    def ready(self, backend: Backend) -> None:
        """Begins to answer with a backend. Reads its tokenizer for masks, which takes seconds."""
        masks = Masks(backend.tokenizer, backend.vocab_size, backend.stop_ids)
        masks.warm()
        prompt = backend.prompt([{"role": "user", "content": ""}], None, True, False, {})
        self._thinks = chat.answer_starts_in(backend.tokenizer, prompt.ids) == "reasoning"
        self._masks, self._backend = masks, backend

    def fail(self, reason: str) -> None:
        """Ends all answers with an error, and gives no more: the server's process is about to end, because a process of
        its mesh is lost or has failed. Any thread may call it."""
        log.error("the server ends: %s", printable(reason, 1_000))
        self._lost = True
        if self._backend is not None:
            self._backend.fail(reason)

    @property
    def backend(self) -> Backend:
        """The backend. Raises `RequestError` while there is none that answers."""
        if self._lost:
            raise unavailable("a process of the model's mesh is lost or has failed; the server's log names it")
        if self._backend is None:
            raise unavailable("the model is loading")
        if self._backend.failed:
            raise unavailable("the engine has failed; the server's log says why")
        if self.stopping:
            raise unavailable("the server is stopping")
        return self._backend

    def app(self) -> ASGIApp:
        """Returns the ASGI application."""
        handlers = {
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.show_metrics),
            "/tokenize": ("POST", self.tokenize),
            "/v1/models": ("GET", self.models),
            "/v1/models/{name:path}": ("GET", self.model),
            "/v1/chat/completions": ("POST", self.chat_completions),
            "/v1/completions": ("POST", self.completions),
            "/v1/responses": ("POST", self.responses),
            "/v1/messages": ("POST", self.messages),
            "/v1/messages/count_tokens": ("POST", self.count_tokens),
        }
        routes = [Route(path, _safe(handler), methods=[method]) for path, (method, handler) in handlers.items()]
        routes += [Route(path, page.handler(path)) for path in page.PATHS]
        inner = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
        return Gate(inner, self.limits, self.metrics, frozenset({*handlers, *page.PATHS}))

    async def health(self, request: Request) -> Response:
        """Says ok, or why requests cannot be answered, with status 503."""
        _ = self.backend
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        """Returns the metrics in Prometheus's format."""
        return Response(self.metrics.text(), media_type=TYPE)

    async def models(self, request: Request) -> Response:
        """Lists the model under each of its names."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.names]})

    async def model(self, request: Request) -> Response:
        """Describes the model."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model(request.path_params["name"]))

    async def chat_completions(self, request: Request) -> Any:
        """Answers a conversation in OpenAI's API."""
        backend, body = await self._read(request, ChatRequest)
        self._check_model(body.model)
        run = await self._run(openai_request.chat_request(body))
        answer = openai_answer.Answer(body.model, backend.tokenizer, "chat")
        if body.stream:
            chunks = answer.pieces([run], _wants_usage(body))
            return EventStream(_openai_frames(chunks), b": ping\n\n")
        return _json(answer.whole(await until_gone(run.whole(), disconnected(request.receive))))

    async def completions(self, request: Request) -> Any:
        """Goes on with texts in OpenAI's API."""
        backend, body = await self._read(request, CompletionRequest)
        self._check_model(body.model)
        generations = await asyncio.to_thread(openai_request.completion, backend, body, self.sampling)
        runs = [Run(backend, generation, self.metrics) for generation in generations]
        answer = openai_answer.Answer(body.model, backend.tokenizer, "text")
        if body.stream:
            return EventStream(_openai_frames(answer.pieces(runs, _wants_usage(body))), b": ping\n\n")

        async def all_of_them() -> list[Any]:
            return [whole for run in runs for whole in await run.whole()]

        choices = await until_gone(all_of_them(), disconnected(request.receive))
        return _json(answer.whole(choices, len(runs)))

    async def responses(self, request: Request) -> Any:
        """Answers a conversation in OpenAI's Responses API. Nothing is stored."""
        _, body = await self._read(request, ResponsesRequest)
        self._check_model(body.model)
        run = await self._run(responses_request.responses_request(body))
        answer = ResponseAnswer(body.model, responses_request.echoed(body))
        if body.stream:
            return EventStream(_named_frames(answer.events(run), answer.failure), b": ping\n\n")
        return _json(await until_gone(answer.whole(run), disconnected(request.receive)))

    async def messages(self, request: Request) -> Any:
        """Answers a conversation in Anthropic's API."""
        _, body = await self._read(request, MessagesRequest)
        self._check_model(body.model)
        run = await self._run(anthropic_request.messages_request(body))
        if body.stream:
            events = anthropic_answer.events(body.model, run)
            frames = _named_frames(events, lambda error: error.body("anthropic"))
            return EventStream(frames, _event({"type": "ping"}))
        (whole,) = await until_gone(run.whole(), disconnected(request.receive))
        return _json(anthropic_answer.whole_message(body.model, whole))

    async def count_tokens(self, request: Request) -> Response:
        """Counts a conversation's tokens in Anthropic's API."""
        backend, body = await self._read(request, CountRequest)
        self._check_model(body.model)
        wanted = anthropic_request.prompt_request(body)
        thinking = self._thinks and wanted.thinking is not False
        async with self.pictures.fetched(wanted) as wanted:
            prompt = await asyncio.to_thread(write_prompt, backend, wanted, thinking)
        return JSONResponse({"input_tokens": len(prompt.ids)})

    async def tokenize(self, request: Request) -> Response:
        """Returns the ids of a text, in which special tokens are spelt out, or of a conversation's prompt."""
        backend, body = await self._read(request, TokenizeRequest)
        if body.model is not None:
            self._check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("expected either prompt or messages", "prompt")
        if body.messages is None:
            ids = await asyncio.to_thread(backend.tokenizer.encode, body.prompt or "", False)
        else:
            wanted = Chat(openai_request.read_messages(body.messages), openai_request.read_tools(body.tools))
            said = openai_request.wants_thinking(body.thinking, body.chat_template_kwargs or TemplateOptions())
            thinking = self._thinks and said is not False
            async with self.pictures.fetched(wanted) as wanted:
                ids = (await asyncio.to_thread(write_prompt, backend, wanted, thinking)).ids
        return JSONResponse({"count": len(ids), "max_model_len": backend.max_length, "tokens": ids})

    async def _read(self, request: Request, kind: type[_Struct]) -> tuple[Backend, _Struct]:
        backend = self.backend
        body = await read_body(request, kind, self.limits.max_body, self.limits.body_seconds)
        return backend, body

    async def _run(self, wanted: Chat) -> Run:
        backend, masks = self.backend, self._masks
        assert masks is not None
        async with self.pictures.fetched(wanted) as wanted:
            generation = await asyncio.to_thread(prepare, backend, masks, wanted, self.sampling, self._thinks)
        return Run(backend, generation, self.metrics)

    def _model(self, name: str) -> dict[str, Any]:
        length = self.backend.max_length
        said = {"id": name, "object": "model", "created": self.created, "owned_by": "kimi-jax"}
        return said | {"context_length": length, "max_model_len": length}

    def _check_model(self, name: str) -> None:
        if name not in self.names:
            known = ", ".join(self.names)
            raise RequestError(
                404,
                f"model is {printable(name, 100)!r}, expected {known}",
                param="model",
                code="model_not_found",
            )


def _safe(handler: _Handler) -> _Handler:
    """Returns a handler that answers errors in the API of the request's path."""

    @functools.wraps(handler)
    async def call(request: Request) -> Any:
        try:
            return await handler(request)
        except RequestError as error:
            found = error
        except ClientGoneError:
            return Response(status_code=499)
        except Exception:
            log.exception("a request failed")
            found = failed()
        return JSONResponse(found.body(style(request.url.path)), found.status, found.headers)

    return call


def _no_route(request: Request, error: Exception) -> Response:
    """Answers where there is no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    what = "there is no such path" if error.status_code == 404 else f"{request.method} is not for this path"
    found = RequestError(error.status_code, what, code="not_found" if error.status_code == 404 else None)
    return JSONResponse(found.body(style(request.url.path)), error.status_code, error.headers)


def _wants_usage(body: ChatRequest | CompletionRequest) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def _json(value: dict[str, Any]) -> Response:
    return Response(_encode(value), media_type="application/json")


def _event(value: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (value["type"].encode(), _encode(value))


async def _openai_frames(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[bytes, None]:
    """Yields the events of OpenAI's API, and in the place of the end what went wrong."""
    try:
        async with contextlib.aclosing(chunks):
            async for chunk in chunks:
                yield b"data: %b\n\n" % _encode(chunk)
        yield b"data: [DONE]\n\n"
    except RequestError as error:
        yield b"data: %b\n\n" % _encode(error.body("openai"))
    except Exception:
        log.exception("a stream failed")
        yield b"data: %b\n\n" % _encode(failed().body("openai"))


async def _named_frames(
    events: AsyncGenerator[dict[str, Any], None], failure: Callable[[RequestError], dict[str, Any]]
) -> AsyncGenerator[bytes, None]:
    """Yields the events of an API that names them, and in the place of the end the event `failure` of what went
    wrong."""
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield _event(event)
    except RequestError as error:
        yield _event(failure(error))
    except Exception:
        log.exception("a stream failed")
        yield _event(failure(failed()))
