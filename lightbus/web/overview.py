"""The map, and the pages that show contracts: apps, events, health."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lightbus import errors
from lightbus.catalog import notices as notice
from lightbus.catalog import who
from lightbus.catalog.live import consumed_queues
from lightbus.web import fields, picture
from lightbus.web.frame import PER_PAGE, Frame, NotFound, paged, query_of
from lightbus.web.picture import Pair
from lightbus.web.source import Snapshot
from lightbus.wire.topology import DEAD_KEY, queue_name


class Overview:
    """Pages about the whole bus, one app, or one event."""

    def __init__(self, frame: Frame) -> None:
        self.frame = frame

    async def map(self, request: Request) -> Response:
        snapshot = await self.frame.snapshot()
        query, app, event = (query_of(request, name) for name in ("q", "app", "event"))
        pairs = _selected(snapshot, query, app, event)
        drawn = pairs[: picture.MOST_EVENTS] if query or app or event or len(pairs) <= picture.MOST_EVENTS else []
        apps = [one for one in snapshot.catalog.contracts if _fits(query, one.app)]
        return self.frame.page(
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
            rows=[_event_row(snapshot, one) for one in drawn],
        )

    async def apps(self, request: Request) -> Response:
        snapshot = await self.frame.snapshot()
        query = query_of(request, "q")
        found = [one for one in snapshot.catalog.contracts if _fits(query, one.app)]
        page, pages, shown = paged(request, found)
        return self.frame.page(
            request, "apps.html", snapshot=snapshot, query=query, page=page, pages=pages, total=len(found), apps=shown
        )

    async def events(self, request: Request) -> Response:
        snapshot = await self.frame.snapshot()
        query, app = query_of(request, "q"), query_of(request, "app")
        found = [
            (contract, event)
            for contract, event in snapshot.catalog.events()
            if (not app or contract.app == app) and _fits(query, event.name)
        ]
        page, pages, shown = paged(request, found)
        rows = [_event_row(snapshot, one) for one in shown]
        return self.frame.page(
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

    async def event(self, request: Request) -> Response:
        snapshot = await self.frame.snapshot()
        name = request.path_params["name"]
        try:
            answer = who.who(snapshot.catalog, name)[0]
        except errors.CatalogError as error:
            raise NotFound(str(error)) from error
        if answer.event != name or answer.field:
            raise NotFound(f"There is no event {name!r}.")
        return self.frame.page(
            request,
            "event.html",
            snapshot=snapshot,
            name=name,
            answer=answer,
            schemas={one.contract.app: fields.rows(one.event.schema) for one in answer.publishers},
            picture=picture.draw(snapshot, [(one.contract, one.event) for one in answer.publishers], name),
        )

    async def app(self, request: Request) -> Response:
        snapshot = await self.frame.snapshot()
        name = request.path_params["name"]
        contract = snapshot.catalog.contract(name)
        if contract is None:
            near = errors.nearest(name, [one.app for one in snapshot.catalog.contracts])
            hint = f" Did you mean {near!r}?" if near else ""
            raise NotFound(f"No app {name!r} has published a contract.{hint}")
        pairs = _selected(snapshot, "", name, "")[: picture.MOST_EVENTS]
        return self.frame.page(
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

    async def health(self, request: Request) -> Response:
        snapshot = await self.frame.snapshot()
        handling = [one for one in snapshot.catalog.contracts if one.handlers]
        known = {} if snapshot.live is None else {one.app: snapshot.live.consumers(one) for one in handling}
        return self.frame.page(
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


def _event_row(snapshot: Snapshot, pair: Pair) -> dict[str, Any]:
    contract, event = pair
    handlers = snapshot.catalog.subscribers(event.name, contract.app)
    return {"contract": contract, "event": event, "apps": list(dict.fromkeys(one.contract.app for one in handlers))}


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
