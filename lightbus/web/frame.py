"""What all pages share: their templates, questions in threads, forms, and pages for errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs

import anyio
import anyio.to_thread
import jinja2
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from lightbus import errors
from lightbus.version import __version__
from lightbus.web import security, text
from lightbus.web.security import Guard
from lightbus.web.source import Snapshot, Source

T = TypeVar("T")

HERE = Path(__file__).parent
QUESTIONS = 4
"""Questions to the broker at once."""
PER_PAGE = 50
"""Rows of a table on one page."""
LONGEST_FORM = 64 * 1024
"""Bytes of a form."""


class NotFound(HTTPException):
    """There is no such page."""

    def __init__(self, detail: str) -> None:
        super().__init__(404, detail)


class Frame:
    """Around each page."""

    def __init__(self, source: Source, guard: Guard, *, actions: bool, is_over: Callable[[], bool]) -> None:
        """
        Args:
            actions: whether dead letters can be retried and purged.
            is_over: whether the server ends, so that streams end, too.
        """
        self.source = source
        self.guard = guard
        self.actions = actions
        self.is_over = is_over
        self._questions = anyio.CapacityLimiter(QUESTIONS)
        self._templates = _templates()

    async def snapshot(self) -> Snapshot:
        """What is known about the bus now."""
        return await self.ask(self.source.snapshot)

    async def ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a blocking function in a thread."""
        return await anyio.to_thread.run_sync(partial(function, *arguments), limiter=self._questions)

    async def failed(self, request: Request, error: Exception) -> Response:
        """A page for an error: never a traceback."""
        status = 500
        problem = "This page could not be made. The terminal of `lightbus web` shows the error."
        if isinstance(error, HTTPException):
            status, problem = error.status_code, error.detail
            if status == 404 and problem == "Not Found":
                problem = "There is no such page."
        elif isinstance(error, errors.LightbusError):
            usage = isinstance(error, errors.InvalidName | errors.CatalogError)
            status, problem = 404 if usage else 503, str(error)
        return self.page(request, "problem.html", problem=problem, status=status)

    def page(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        """A page from a template. A browser without a cookie for forms gets one."""
        snapshot = values.get("snapshot")
        if isinstance(snapshot, Snapshot) and snapshot.problem and not snapshot.at:
            status = 503
        browser = security.cookie(request.headers, security.BROWSER)
        fresh = not browser
        if fresh:
            browser = security.new_browser()
        content = self._templates.get_template(template).render(
            path=request.url.path,
            place=self.source.place,
            known=self.guard.knows(request.headers),
            actions=self.actions,
            has_broker=self.source.broker is not None,
            form_token=self.guard.form_token(browser),
            version=__version__,
            **values,
        )
        response = HTMLResponse(content, status)
        if fresh:
            security.set_cookie(response, security.BROWSER, browser, secure=request.url.scheme == "https")
        return response


def _templates() -> jinja2.Environment:
    """Everything is escaped, except templates' own markup."""

    def shown(value: Any) -> Any:
        return text.printable(value) if type(value) is str else value

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Jinja2's types of these dictionaries are those of the filters that come with it.
    filters: dict[str, Any] = found.filters
    filters.update({"quoted": text.quoted, "ago": text.ago, "moment": text.moment, "cut": text.cut})
    names: dict[str, Any] = found.globals
    names.update({"counted": text.counted})
    return found


def query_of(request: Request, name: str) -> str:
    """A part of the query, without spaces around it, and at most 255 characters; "" if it is missing."""
    return request.query_params.get(name, "").strip()[:255]


def paged(request: Request, found: Sequence[T]) -> tuple[int, int, Sequence[T]]:
    """The number of the page, the number of pages, and its part of the rows."""
    pages = max(1, math.ceil(len(found) / PER_PAGE))
    given = request.query_params.get("page", "1")
    page = min(pages, max(1, int(given))) if given.isdecimal() and len(given) < 6 else 1
    return page, pages, found[(page - 1) * PER_PAGE : page * PER_PAGE]


async def form_of(request: Request) -> dict[str, list[str]]:
    """The fields of a form that was sent.

    Raises:
        HTTPException: it is too long, or no form.
    """
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > LONGEST_FORM:
            raise HTTPException(413, "This form is too long.")
    try:
        return parse_qs(content.decode(), max_num_fields=1000)
    except ValueError as error:
        raise HTTPException(400, "This form cannot be read.") from error


def first(form: Mapping[str, list[str]], name: str) -> str:
    """The first value of a field; "" if there is none."""
    return form.get(name, [""])[0]
