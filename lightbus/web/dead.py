"""The pages about dead letters, and their actions."""

from __future__ import annotations

from functools import partial

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from lightbus.dead_letters.letter import DeadLetter, Filter
from lightbus.web import letters, text
from lightbus.web.frame import Frame, NotFound, first, form_of, paged, query_of
from lightbus.wire import codec
from lightbus.wire.topology import check_app_name

HIDDEN = ("lightbus-error-", "x-death", "x-first-death", "x-last-death", "x-delivery-count")
"""Headers that the page shows elsewhere, or that only brokers use: the beginnings of their names."""


class Dead:
    """Lists, one dead letter, retry and purge."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    async def apps(self, request: Request) -> Response:
        if app := query_of(request, "app"):
            return RedirectResponse(f"/dead/{text.quoted(app)}", 303)
        snapshot = await self.frame.snapshot()
        handling = [one for one in snapshot.catalog.contracts if one.handlers]
        counts = [(one, snapshot.dead(one)) for one in handling]
        counts.sort(key=lambda one: (-(one[1] or 0), one[0].app))
        page, pages, shown = paged(request, counts)
        return self.frame.page(request, "dead.html", snapshot=snapshot, page=page, pages=pages, counts=shown)

    async def of_app(self, request: Request) -> Response:
        app = check_app_name(request.path_params["app"])
        event, handler, error = (query_of(request, name) for name in ("event", "handler", "error"))
        wanted = Filter(event=event or None, handler=handler or None, error=error or None)
        listing = await self.frame.ask(letters.listed, self.frame.source, app, wanted)
        return self.frame.page(
            request,
            "dead_of.html",
            app=app,
            listing=listing,
            wanted=wanted,
            handlers=await self._handlers(app),
        )

    async def one(self, request: Request) -> Response:
        app = check_app_name(request.path_params["app"])
        digest = _digest(request.path_params["digest"])
        found = await self.frame.ask(letters.selected, self.frame.source, app, [digest])
        if not found:
            raise NotFound(
                f"This dead letter of {app} was retried or purged, or is not among the first {letters.READ_FOR_ONE:,} "
                "of its queue."
            )
        one = found[0]
        body, kind = text.body(one.delivery.body)
        headers = one.delivery.properties.get("headers")
        shown = {str(key): value for key, value in headers.items()} if isinstance(headers, dict) else {}
        return self.frame.page(
            request,
            "letter.html",
            app=app,
            letter=one,
            body=body,
            kind=kind,
            traceback=text.cut(one.traceback, text.LONGEST),
            headers=[
                (key, text.cut(str(shown[key]), 1000)) for key in sorted(shown)[:100] if not key.startswith(HIDDEN)
            ],
            correlation=one.delivery.properties.get("correlation_id"),
            causation=shown.get(codec.CAUSATION),
            lacking=_lacks(one, await self._handlers(app)),
        )

    async def act(self, request: Request) -> Response:
        """Retry or purge: the first POST asks, the second one, with `confirmed`, does it."""
        app = check_app_name(request.path_params["app"])
        action = request.path_params["action"]
        if action not in ("retry", "purge"):
            raise NotFound(f"There is no action {action!r}.")
        form = await form_of(request)
        if not self.frame.actions:
            raise HTTPException(403, "Actions are off. Start the server with --allow-actions to retry and purge.")
        if not self.frame.guard.allows_form(request.headers, first(form, "form")):
            raise HTTPException(
                403, "This form is not from this page, or the server was started again. Open the page again."
            )
        digests = [_digest(one) for one in form.get("letter", [])[: letters.SHOWN]]
        if not digests:
            raise HTTPException(400, "No dead letter is selected. Go back, and select at least one.")
        if first(form, "confirmed") == "yes":
            outcome = await self.frame.ask(
                partial(letters.act, trust_origin=first(form, "trust") == "yes"),
                self.frame.source,
                app,
                action,
                digests,
            )
            self.frame.source.expire()
            return self.frame.page(request, "done.html", app=app, action=action, outcome=outcome, asked=len(digests))
        found = await self.frame.ask(letters.selected, self.frame.source, app, digests)
        handlers = await self._handlers(app)
        return self.frame.page(
            request,
            "confirm.html",
            app=app,
            action=action,
            found=found,
            asked=len(digests),
            unproven=sum(not one.proven for one in found),
            lacking=sorted({one.handler or "" for one in found if _lacks(one, handlers)}),
        )

    async def _handlers(self, app: str) -> set[str] | None:
        """The names of an app's handlers; None if it has no contract."""
        contract = (await self.frame.snapshot()).catalog.contract(app)
        return None if contract is None else {one.handler for one in contract.handlers}


def _lacks(one: DeadLetter, handlers: set[str] | None) -> bool:
    """Whether its handler no longer exists."""
    return one.handler is not None and handlers is not None and one.handler not in handlers


def _digest(given: str) -> bytes:
    try:
        return bytes.fromhex(given)
    except ValueError as error:
        raise NotFound("There is no such dead letter.") from error
