"""The HTTP application."""

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sapt_jax.ask.model import Model
from sapt_jax.serve.batches import Batches, FullError
from sapt_jax.serve.protocol import BadRequestError, Wanted, read_request, write_error, write_response

_log = logging.getLogger(__name__)
# Nobody reads it: the client has gone.
_GONE = Response(status_code=499)


@dataclasses.dataclass(frozen=True)
class Options:
    """How a server behaves.

    Attributes:
      name: what the model is called in responses.
      token: what "Authorization: Bearer" has to say; "" lets everybody in.
      queue: rows that may wait; more get 429.
      timeout: seconds that a request may take; then it gets 504.
      most_bytes: of a request's body; more get 413.
      most_tokens: of an answer.
      reload: seconds between two looks for tasks that a training has finished; 0 is never.
    """

    name: str = "sapt"
    token: str = ""
    queue: int = 256
    timeout: float = 120.0
    most_bytes: int = 1_000_000
    most_tokens: int = 1024
    reload: float = 10.0


class _Server:
    def __init__(self, model: Model, options: Options):
        self.model, self.options = model, options
        self.registry = CollectorRegistry()
        of = {"registry": self.registry}
        self.requests = Counter("sapt_requests", "Requests by path and status.", ("path", "status"), **of)
        self.seconds = Histogram("sapt_request_seconds", "From the request to its response.", **of)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
        self.sizes = Histogram("sapt_batch_rows", "Rows that were answered together.", buckets=sizes, **of)
        self.tokens = Counter("sapt_new_tokens", "Tokens of answers.", **of)
        self.reloads = Counter("sapt_reloads", "Looks that found new tasks, or failed.", ("result",), **of)
        tasks = Gauge("sapt_tasks", "Tasks that answer.", **of)
        tasks.set_function(lambda: len(self.model.tasks))
        self.batches = Batches(model.answer, model.most_rows, options.queue, self.sizes.observe)
        Gauge("sapt_waiting_rows", "Rows in the queue.", **of).set_function(lambda: self.batches.waiting)
        # Long texts take their time to tokenise, and must hold up neither the loop nor the device.
        self.encoder = ThreadPoolExecutor(1, "encoder")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self.batches.run())]
        if self.options.reload:
            tasks.append(asyncio.create_task(self._reload()))
        yield
        for task in tasks:
            task.cancel()

    async def _reload(self) -> None:
        while True:
            await asyncio.sleep(self.options.reload)
            try:
                if await self.batches.in_thread(self.model.refresh):
                    self.reloads.labels("taken").inc()
                    _log.warning("the run has learned %s", ", ".join(self.model.tasks))
            except Exception as error:
                # What was loaded goes on answering.
                self.reloads.labels("failed").inc()
                _log.warning("the workdir could not be read again: %s", error)

    # --- Answers ------------------------------------------------------------------------------------------------------

    async def completions(self, request: Request) -> Response:
        return await self._counted(request, chat=False)

    async def chat(self, request: Request) -> Response:
        return await self._counted(request, chat=True)

    async def _counted(self, request: Request, chat: bool) -> Response:
        start = time.perf_counter()
        response = await self._told(lambda: self._complete(request, chat))
        self.requests.labels(request.url.path, response.status_code).inc()
        self.seconds.observe(time.perf_counter() - start)
        return response

    async def _told(self, answer: Callable[[], Awaitable[Response]]) -> Response:
        """A response, or what went wrong as OpenAI's clients read it."""
        try:
            return await asyncio.wait_for(answer(), self.options.timeout)
        except BadRequestError as error:
            return _error(str(error), error.status, error.field)
        except ClientDisconnect:
            return _GONE
        except FullError:
            return _error("too many requests wait already: try again later", 429)
        except TimeoutError:
            return _error(f"the request took longer than {self.options.timeout:g} seconds", 504)
        except RuntimeError as error:
            return _error(f"the answer failed: {error}", 500)

    async def _complete(self, request: Request, chat: bool) -> Response:
        self._check_token(request)
        wanted = read_request(await self._body(request), chat, self.options.most_tokens)
        self.batches.check_room(len(wanted.questions) * wanted.choices)
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self.encoder, self._rows, wanted)
        asked = asyncio.create_task(self.batches.ask(rows))
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((asked, gone), return_when=asyncio.FIRST_COMPLETED)
            if not asked.done():
                return _GONE
            answers = asked.result()
        finally:
            asked.cancel()
            gone.cancel()
        self.tokens.inc(sum(answer.new_tokens for answer in answers))
        return JSONResponse(write_response(wanted, answers, self.options.name, chat))

    def _rows(self, wanted: Wanted) -> list[Any]:
        try:
            search = self.model.search(**wanted.search)
            number, rows = 0, []
            for question in wanted.questions:
                for _ in range(wanted.choices):
                    rows.append(self.model.row(question, search, number))
                    number += 1
            return rows
        except ValueError as error:
            named = str(error).partition(" ")[0].partition("=")[0]
            raise BadRequestError(str(error), named if named in wanted.search else None) from None

    def _check_token(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.options.token and not hmac.compare_digest(given.encode(), self.options.token.encode()):
            raise BadRequestError("the token of Authorization: Bearer is not the server's", status=401)

    async def _body(self, request: Request) -> bytes:
        body, most = b"", self.options.most_bytes
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise BadRequestError(f"the body is longer than {most} bytes", status=413)
        return body

    # --- What it is ---------------------------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        async def told() -> Response:
            self._check_token(request)
            model = {"id": self.options.name, "object": "model", "created": 0, "owned_by": "sapt_jax"}
            return JSONResponse({"object": "list", "data": [{**model, "tasks": list(self.model.tasks)}]})

        return await self._told(told)

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "tasks": list(self.model.tasks), "waiting": self.batches.waiting})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _error(message: str, status: int, field: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status == 429 else {"Connection": "close"} if status == 413 else None
    return JSONResponse(write_error(message, field, status), status, headers)


def make_app(model: Model, options: Options) -> Starlette:
    """The application that answers with a model; it serves one event loop."""
    server = _Server(model, options)
    return Starlette(
        routes=[
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/models", server.models),
            Route("/health", server.health),
            Route("/metrics", server.metrics),
        ],
        lifespan=server.lifespan,
    )
