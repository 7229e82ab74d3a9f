"""The addresses of the pages, as an ASGI application."""

from __future__ import annotations

from collections.abc import Callable

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from lightbus import errors
from lightbus.web.pages import HERE, Pages
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
    pages = Pages(source, guard, actions=actions, is_over=is_over)
    routes = [
        Route("/", pages.map),
        Route("/apps", pages.apps),
        Route("/apps/{name:path}", pages.app),
        Route("/events", pages.events),
        Route("/events/{name:path}", pages.event),
        Route("/dead", pages.dead),
        Route("/dead/{app}", pages.dead_of),
        Route("/dead/{app}/{action}", pages.act, methods=["POST"]),
        Route("/dead/{app}/{digest}", pages.letter),
        Route("/tail", pages.tail),
        Route("/tail/events", pages.tail_events),
        Route("/health", pages.health),
        Route("/login", pages.login, methods=["GET", "POST"]),
        Mount("/static", StaticFiles(directory=HERE / "static")),
    ]
    handled: tuple[type[Exception], ...] = (HTTPException, errors.LightbusError, Exception)
    return Guarded(Starlette(routes=routes, exception_handlers=dict.fromkeys(handled, pages.failed)), guard)
