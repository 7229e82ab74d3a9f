"""The pages: what each reads, and which template shows it."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs

import anyio
import anyio.to_thread
import jinja2
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse

from lightbus import errors
from lightbus.catalog import notices as notice
from lightbus.catalog import who
from lightbus.catalog.live import consumed_queues
from lightbus.dead_letters.letter import DeadLetter, Filter
from lightbus.version import __version__
from lightbus.web import fields, letters, picture, security, stream, text
from lightbus.web.picture import Pair
from lightbus.web.security import Guard
from lightbus.web.source import Snapshot, Source
from lightbus.wire import codec
from lightbus.wire.topology import DEAD_KEY, check_app_name, queue_name

T = TypeVar("T")

HERE = Path(__file__).parent
QUESTIONS = 4
"""Questions to the broker at once."""
PER_PAGE = 50
"""Rows of a table on one page."""
LONGEST_FORM = 64 * 1024
"""Bytes of a form."""
COLLECTED = 5.0
"""Seconds for which events are collected for a page without scripts."""
HIDDEN = ("lightbus-error-", "x-death", "x-first-death", "x-last-death", "x-delivery-count")
"""Headers of a dead letter that the page shows elsewhere, or that only brokers use: the beginnings of their names."""

Endpoint = Callable[[Request], Awaitable[Response]]


class Pages:
    """All pages, of one bus."""

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
        self._streams = anyio.CapacityLimiter(stream.STREAMS)
        self._open_streams = 0
        self.templates = _templates()

    # --- the map, and lists

    async def map(self, request: Request) -> Response:
        snapshot = await self._snapshot()
        query, app, event = (_query(request, name) for name in ("q", "app", "event"))
        pairs = _selected(snapshot, query, app, event)
        drawn = pairs[: picture.MOST_EVENTS] if query or app or event or len(pairs) <= picture.MOST_EVENTS else []
        apps = [one for one in snapshot.catalog.contracts if _fits(query, one.app)]
        return self._page(
            request,
            "map.html",
            snapshot=snapshot,
            query=query,
            app=app,
            event=event,
            pairs=pairs,
            drawn=drawn,
            apps=apps,
            picture=picture.draw(snapshot, drawn, app or event) if drawn else None,
            rows=[self._event_row(snapshot, one) for one in drawn],
        )

    async def apps(self, request: Request) -> Response:
        snapshot = await self._snapshot()
        query = _query(request, "q")
        found = [one for one in snapshot.catalog.contracts if _fits(query, one.app)]
        page, pages, shown = _paged(request, found)
        return self._page(
            request, "apps.html", snapshot=snapshot, query=query, page=page, pages=pages, total=len(found), apps=shown
        )

    async def events(self, request: Request) -> Response:
        snapshot = await self._snapshot()
        query, app = _query(request, "q"), _query(request, "app")
        found = [
            (contract, event)
            for contract, event in snapshot.catalog.events()
            if (not app or contract.app == app) and _fits(query, event.name)
        ]
        page, pages, shown = _paged(request, found)
        rows = [self._event_row(snapshot, one) for one in shown]
        return self._page(
            request,
            "events.html",
            snapshot=snapshot,
            query=query,
            app=app,
            page=page,
            pages=pages,
            total=len(found),
            rows=rows,
        )

    def _event_row(self, snapshot: Snapshot, pair: Pair) -> dict[str, Any]:
        contract, event = pair
        handlers = snapshot.catalog.subscribers(event.name, contract.app)
        return {"contract": contract, "event": event, "apps": list(dict.fromkeys(one.contract.app for one in handlers))}

    # --- one event, one app

    async def event(self, request: Request) -> Response:
        snapshot = await self._snapshot()
        name = request.path_params["name"]
        try:
            answer = who.who(snapshot.catalog, name)[0]
        except errors.CatalogError as error:
            raise _NotFound(str(error)) from error
        if answer.event != name or answer.field:
            raise _NotFound(f"There is no event {name!r}.")
        return self._page(
            request,
            "event.html",
            snapshot=snapshot,
            name=name,
            answer=answer,
            schemas={one.contract.app: fields.rows(one.event.schema) for one in answer.publishers},
            picture=picture.draw(snapshot, [(one.contract, one.event) for one in answer.publishers], name),
        )

    async def app(self, request: Request) -> Response:
        snapshot = await self._snapshot()
        name = request.path_params["name"]
        contract = snapshot.catalog.contract(name)
        if contract is None:
            near = errors.nearest(name, [one.app for one in snapshot.catalog.contracts])
            hint = f" Did you mean {near!r}?" if near else ""
            raise _NotFound(f"No app {name!r} has published a contract.{hint}")
        pairs = _selected(snapshot, "", name, "")[: picture.MOST_EVENTS]
        return self._page(
            request,
            "app.html",
            snapshot=snapshot,
            contract=contract,
            queues=[(one, snapshot.state(one)) for one in consumed_queues(contract)],
            dead_queue=queue_name(name, DEAD_KEY),
            picture=picture.draw(snapshot, pairs, name) if pairs else None,
            notices=[one for one in notice.notices(snapshot.catalog) if one.app == name][:PER_PAGE],
            most=PER_PAGE,
        )

    # --- dead letters

    async def dead(self, request: Request) -> Response:
        snapshot = await self._snapshot()
        handling = [one for one in snapshot.catalog.contracts if one.handlers]
        counts = [(one, snapshot.dead(one)) for one in handling]
        counts.sort(key=lambda one: (-(one[1] or 0), one[0].app))
        page, pages, shown = _paged(request, counts)
        if app := _query(request, "app"):
            return RedirectResponse(f"/dead/{text.quoted(app)}", 303)
        return self._page(request, "dead.html", snapshot=snapshot, page=page, pages=pages, counts=shown)

    async def dead_of(self, request: Request) -> Response:
        app = check_app_name(request.path_params["app"])
        event, handler, error = (_query(request, name) for name in ("event", "handler", "error"))
        wanted = Filter(event=event or None, handler=handler or None, error=error or None)
        listing = await self._ask(letters.listed, self.source, app, wanted)
        return self._page(
            request,
            "dead_of.html",
            app=app,
            listing=listing,
            wanted=wanted,
            most=letters.SHOWN,
            handlers=await self._handlers(app),
        )

    async def letter(self, request: Request) -> Response:
        app = check_app_name(request.path_params["app"])
        digest = _digest(request.path_params["digest"])
        found = await self._ask(letters.selected, self.source, app, [digest])
        if not found:
            raise _NotFound(f"This dead letter of {app} is no longer in its queue: it was retried or purged.")
        one = found[0]
        body, kind = text.body(one.delivery.body)
        headers = one.delivery.properties.get("headers") if isinstance(one.delivery.properties, Mapping) else None
        shown = headers if isinstance(headers, dict) else {}
        return self._page(
            request,
            "letter.html",
            app=app,
            letter=one,
            body=body,
            kind=kind,
            traceback=text.cut(one.traceback, text.LONGEST),
            headers=[
                (str(key), text.cut(str(value), 1000))
                for key, value in sorted(shown.items(), key=lambda item: str(item[0]))[:100]
                if not str(key).startswith(HIDDEN)
            ],
            correlation=one.delivery.properties.get("correlation_id"),
            causation=shown.get(codec.CAUSATION),
            lacking=self._lacks(one, await self._handlers(app)),
        )

    async def act(self, request: Request) -> Response:
        """Retry or purge: the first POST asks, the second one, with `confirmed`, does it."""
        app = check_app_name(request.path_params["app"])
        action = request.path_params["action"]
        if action not in ("retry", "purge"):
            raise _NotFound(f"There is no action {action!r}.")
        form = await _form(request)
        if not self.actions:
            raise HTTPException(403, "Actions are off. Start the server with --allow-actions to retry and purge.")
        if not self.guard.allows_form(request.headers, _one(form, "form")):
            raise HTTPException(
                403, "This form is not from this page, or the server was started again. Open the page again."
            )
        digests = list(dict.fromkeys(_digest(one) for one in form.get("letter", [])))[: letters.SHOWN]
        if not digests:
            raise HTTPException(400, "No dead letter is selected. Go back, and select at least one.")
        if _one(form, "confirmed") == "yes":
            outcome = await self._ask(
                partial(letters.act, trust_origin=_one(form, "trust") == "yes"), self.source, app, action, digests
            )
            self.source.expire()
            return self._page(request, "done.html", app=app, action=action, outcome=outcome, asked=len(digests))
        found = await self._ask(letters.selected, self.source, app, digests)
        handlers = await self._handlers(app)
        return self._page(
            request,
            "confirm.html",
            app=app,
            action=action,
            found=found,
            asked=len(digests),
            unproven=sum(not one.proven for one in found),
            lacking=sorted({one.handler or "" for one in found if self._lacks(one, handlers)}),
        )

    async def _handlers(self, app: str) -> set[str] | None:
        """The names of an app's handlers; None if it has no contract."""
        contract = (await self._snapshot()).catalog.contract(app)
        return None if contract is None else {one.handler for one in contract.handlers}

    def _lacks(self, one: DeadLetter, handlers: set[str] | None) -> bool:
        """Whether its handler no longer exists."""
        return one.handler is not None and handlers is not None and one.handler not in handlers

    # --- live events

    async def tail(self, request: Request) -> Response:
        given = {name: _query(request, name) for name in ("pattern", "source", "contains")}
        problem, collected = "", None
        try:
            wanted = stream.read(**given)
            if self.source.broker is None:
                self.source.app_named("any")
            if _query(request, "collect"):
                self._check_streams()
                tail = stream.open_tail(self.source, wanted)
                collected = await self._counted(stream.collect, tail, COLLECTED, 50)
        except errors.LightbusError as error:
            problem = str(error)
        return self._page(
            request, "tail.html", given=given, problem=problem, collected=collected, seconds=COLLECTED, status=200
        )

    async def tail_events(self, request: Request) -> Response:
        try:
            wanted = stream.read(*(_query(request, name) for name in ("pattern", "source", "contains")))
            self._check_streams()
            tail = stream.open_tail(self.source, wanted)
        except errors.LightbusError as error:
            return PlainTextResponse(f"{error}\n", 400)

        async def events() -> Any:
            self._open_streams += 1
            try:
                async for one in stream.events(tail, self.is_over, self._streams):
                    yield one
            finally:
                self._open_streams -= 1
                tail.let_go()

        return StreamingResponse(events(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

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

    # --- health

    async def health(self, request: Request) -> Response:
        snapshot = await self._snapshot()
        handling = [one for one in snapshot.catalog.contracts if one.handlers]
        known = {} if snapshot.live is None else {one.app: snapshot.live.consumers(one) for one in handling}
        return self._page(
            request,
            "health.html",
            snapshot=snapshot,
            handling=handling,
            alive=[one for one in handling if known.get(one.app)],
            down=[one for one in handling if known.get(one.app) == 0],
            unknown=[one for one in handling if known.get(one.app) is None],
            dead=[(one, count) for one in handling if (count := snapshot.dead(one))],
            notices=notice.notices(snapshot.catalog),
            most=PER_PAGE,
        )

    # --- login

    async def login(self, request: Request) -> Response:
        problem = ""
        if request.method == "POST":
            form = await _form(request)
            if not security.is_own_origin(request.headers):
                raise HTTPException(403, "This form is not from this page. Open the page again.")
            if self.guard.is_token(_one(form, "token").strip()):
                response: Response = RedirectResponse("/", 303)
                security.set_cookie(
                    response,
                    security.SESSION,
                    self.guard.session(),
                    secure=request.url.scheme == "https",
                    seconds=security.HOURS * 3600,
                )
                return response
            await anyio.sleep(0.5)
            problem = "This is not the token."
        elif self.guard.token is None or self.guard.knows(request.headers):
            return RedirectResponse("/", 303)
        return self._page(request, "login.html", problem=problem, status=401 if problem else 200)

    # --- all pages

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
        return self._page(request, "problem.html", problem=problem, status=status)

    async def _snapshot(self) -> Snapshot:
        return await self._ask(self.source.snapshot)

    async def _ask(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a blocking function in a thread."""
        return await anyio.to_thread.run_sync(partial(function, *arguments), limiter=self._questions)

    def _page(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        snapshot = values.get("snapshot")
        if isinstance(snapshot, Snapshot) and snapshot.problem and not snapshot.at:
            status = 503
        browser = security.cookie(request.headers, security.BROWSER)
        fresh = not browser
        if fresh:
            browser = security.new_browser()
        content = self.templates.get_template(template).render(
            path=request.url.path,
            place=self.source.place,
            actions=self.actions,
            has_broker=self.source.broker is not None,
            has_token=self.guard.token is not None and template != "login.html",
            form_token=self.guard.form_token(browser),
            version=__version__,
            **values,
        )
        response = HTMLResponse(content, status)
        if fresh:
            security.set_cookie(response, security.BROWSER, browser, secure=request.url.scheme == "https")
        return response


class _NotFound(HTTPException):
    def __init__(self, detail: str) -> None:
        super().__init__(404, detail)


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
    found.filters |= {"quoted": text.quoted, "ago": text.ago, "moment": text.moment, "cut": text.cut}
    found.globals |= {"counted": text.counted}
    return found


def _query(request: Request, name: str) -> str:
    return request.query_params.get(name, "").strip()[:255]


def _fits(query: str, name: str) -> bool:
    return query.lower() in name.lower()


def _selected(snapshot: Snapshot, query: str, app: str, event: str) -> list[Pair]:
    """The events on the map: of an app, those that it publishes or handles."""
    found: list[Pair] = []
    for contract, one in snapshot.catalog.events():
        if event and one.name != event:
            continue
        handlers = () if not app else snapshot.catalog.subscribers(one.name, contract.app)
        if app and contract.app != app and not any(each.contract.app == app for each in handlers):
            continue
        if query and not (_fits(query, one.name) or _fits(query, contract.app)):
            continue
        found.append((contract, one))
    return found


def _paged(request: Request, found: Sequence[T]) -> tuple[int, int, Sequence[T]]:
    """The number of the page, the number of pages, and its part of the rows."""
    pages = max(1, math.ceil(len(found) / PER_PAGE))
    given = request.query_params.get("page", "1")
    page = min(pages, max(1, int(given))) if given.isdecimal() and len(given) < 6 else 1
    return page, pages, found[(page - 1) * PER_PAGE : page * PER_PAGE]


def _digest(given: str) -> bytes:
    try:
        return bytes.fromhex(given)
    except ValueError as error:
        raise _NotFound("There is no such dead letter.") from error


async def _form(request: Request) -> dict[str, list[str]]:
    """
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


def _one(form: Mapping[str, list[str]], name: str) -> str:
    return form.get(name, [""])[0]
