"""The page of live events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar, cast

import anyio
import anyio.to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Send

from lightbus import errors
from lightbus.web import stream
from lightbus.web.frame import Frame, query_of

T = TypeVar("T")

COLLECTED = 3.0
"""Seconds for which events are collected for a page without scripts."""
PATIENCE = 30.0
"""Seconds that a part of a stream may take to be sent."""


class EventStream(StreamingResponse):
    """Ends if a browser keeps the connection, but does not read for `PATIENCE` seconds."""

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            with anyio.fail_after(PATIENCE):
                await send(message)

        try:
            await super().stream_response(send_in_time)
        except TimeoutError:
            await cast("AsyncGenerator[str]", self.body_iterator).aclose()


class Live:
    """The page, and its stream."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self._streams = anyio.CapacityLimiter(stream.STREAMS)
        self._open_streams = 0

    async def page(self, request: Request) -> Response:
        given = {name: query_of(request, name) for name in ("pattern", "source", "contains")}
        problem, collected = "", None
        try:
            wanted = stream.read(**given)
            if self.frame.source.broker is None:
                self.frame.source.app_named("any")
            if query_of(request, "collect"):
                self._check_streams()
                tail = stream.open_tail(self.frame.source, wanted)
                collected = await self._counted(stream.collect, tail, COLLECTED, 50)
        except errors.LightbusError as error:
            problem = stream.explained(error, self.frame.source)
        return self.frame.page(
            request, "tail.html", given=given, problem=problem, collected=collected, seconds=COLLECTED, status=200
        )

    async def events(self, request: Request) -> Response:
        given = [query_of(request, name) for name in ("pattern", "source", "contains")]

        async def events() -> AsyncIterator[str]:
            # Only what has begun is ended: so the queue is opened here, not before the answer begins.
            try:
                wanted = stream.read(*given)
                self._check_streams()
                tail = stream.open_tail(self.frame.source, wanted)
            except (errors.LightbusError, HTTPException) as error:
                yield stream.problem(error.detail if isinstance(error, HTTPException) else str(error))
                return
            self._open_streams += 1
            try:
                async for one in stream.events(self.frame.source, tail, self.frame.is_over, self._streams):
                    yield one
            finally:
                self._open_streams -= 1
                tail.let_go()

        return EventStream(events(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    def _check_streams(self) -> None:
        if self._open_streams >= stream.STREAMS:
            raise HTTPException(
                503, f"{stream.STREAMS} pages already show live events. Close one of them, and open this page again."
            )

    async def _counted(self, function: Callable[..., T], *arguments: Any) -> T:
        self._open_streams += 1
        try:
            return await anyio.to_thread.run_sync(partial(function, *arguments), limiter=self._streams)
        finally:
            self._open_streams -= 1
