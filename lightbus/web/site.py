"""The addresses of the pages, as an ASGI application."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from lightbus import errors
from lightbus.web.dead import Dead
from lightbus.web.frame import HERE, Frame
from lightbus.web.live import Live
from lightbus.web.login import Login
from lightbus.web.overview import Overview
from lightbus.web.security import Guard, Guarded
from lightbus.web.source import Source


def site(
    source: Source, guard: Guard, *, actions: bool = False, is_over: Callable[[], bool] = lambda: False
) -> ASGIApp:
    """All pages, behind the guard.

    Args:
        actions: whether dead letters can be retried and purged.
        is_over: whether the server ends, so that streams end, too.
    """
    frame = Frame(source, guard, actions=actions, is_over=is_over)
    overview, dead, live = Overview(frame), Dead(frame), Live(frame)
    routes = [
        Route("/", overview.map),
        Route("/apps", overview.apps),
        Route("/apps/{name:path}", overview.app),
        Route("/events", overview.events),
        Route("/events/{name:path}", overview.event),
        Route("/dead", dead.apps),
        Route("/dead/{app}", dead.of_app),
        Route("/dead/{app}/{action}", dead.act, methods=["POST"]),
        Route("/dead/{app}/{digest}", dead.one),
        Route("/tail", live.page),
        Route("/tail/events", live.events),
        Route("/health", overview.health),
        Route("/login", Login(frame).page, methods=["GET", "POST"]),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    handled: tuple[type[Exception], ...] = (HTTPException, errors.LightbusError, Exception)
    return Guarded(Starlette(routes=routes, exception_handlers=dict.fromkeys(handled, frame.failed)), guard)
