"""Django's database connections outside of requests. Each thread has its own ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import anyio
import anyio.to_thread
from django.apps import apps
from django.db import Error, close_old_connections, connections, reset_queries, transaction

from lightbus import errors

P = ParamSpec("P")
T = TypeVar("T")

atomic: Any = transaction.atomic  # type checkers do not see that it may be a context manager

VENDORS = ("postgresql", "mysql", "sqlite")
"""Of Django; MariaDB is among "mysql"."""


def check_database(owner: str, using: object) -> None:
    """
    Raises:
        errors.InvalidOption: no such database in DATABASES, or `lightbus.django` is not installed.
    """
    known: list[str] = [*connections]
    if using not in known:
        raise errors.InvalidOption(
            f"{owner}: using={using!r} is not in the setting DATABASES, which has {', '.join(map(repr, known))}."
        )
    if apps.apps_ready and not apps.is_installed("lightbus.django"):
        raise errors.InvalidOption(
            f'{owner} needs its tables: add "lightbus.django" to INSTALLED_APPS, then run manage.py migrate.'
        )


def model(name: str) -> Any:
    """A model of this app. They can be imported only after Django is set up."""
    return apps.get_model("lightbus", name)


@contextlib.contextmanager
def as_in_a_request() -> Generator[None]:
    """What Django does at the beginning and the end of a request: close connections that are broken or older than
    CONN_MAX_AGE, and forget the queries that DEBUG collects.
    """
    reset_queries()
    close_old_connections()
    try:
        yield
    finally:
        close_old_connections()


class DatabaseThread:
    """A thread, with the connection that this thread has to one database, until the end of the block."""

    def __init__(self, using: str) -> None:
        self._using = using
        self._limiter = anyio.CapacityLimiter(1)

    async def __aenter__(self) -> DatabaseThread:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="lightbus database")
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.run(self._close)
        self._executor.shutdown(wait=False)

    async def run(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Call it in this thread. Not cancelled: it ends within the limits of the database."""

        def in_its_thread() -> T:
            return self._executor.submit(self._call, lambda: function(*args, **named)).result()

        return await anyio.to_thread.run_sync(in_its_thread, limiter=self._limiter)

    def _call(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except Error:
            connection = connections[self._using]
            if not connection.in_atomic_block:
                connection.close()  # it may be broken; the next call opens another one
            raise
        finally:
            reset_queries()

    def _close(self) -> None:
        connections[self._using].close()
