"""The outboxes that MODULE:ATTR names, and calls to their databases."""

from __future__ import annotations

import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

import click

if TYPE_CHECKING:
    from lightbus import Lightbus
    from lightbus.outbox.relay import Relay
    from lightbus.outbox.store import Store

T = TypeVar("T")
Given = TypeVarTuple("Given")


def relays(app: Lightbus) -> list[Relay]:
    """The relays of an app, one for each database with an outbox."""
    module = sys.modules.get("lightbus.outbox.relay")  # an app with an outbox has imported it
    found: list[Any] = [] if module is None else [one for one in app.services if isinstance(one, module.Relay)]
    return found


def require(found: Sequence[Relay], app: Lightbus) -> None:
    """
    Raises:
        errors.TargetError: there is none.
    """
    from lightbus import errors

    if not found:
        raise errors.TargetError(
            f"app {app.name!r} has no outbox with a database. Create one where the app is imported from: "
            "outbox = Outbox(app, engine), or with Django Outbox(app)."
        )


def require_shared_broker(app: Lightbus) -> None:
    """
    Raises:
        errors.TargetError: it is in memory. What a relay sends there would be gone.
    """
    from lightbus import errors

    if any(address.private for address in app.broker.addresses):
        raise errors.TargetError(
            f"the broker of app {app.name!r} is memory://, which only this process can use: no worker would receive "
            "what the relay sends. Set LIGHTBUS_URL, or the app's url=, to the broker of the workers."
        )


def find(target: str) -> list[Store]:
    """The outbox that MODULE:ATTR names, or all outboxes of the app that it names.

    Raises:
        errors.TargetError: there is no such app, or it has no outbox.
    """
    from lightbus.cli import logs
    from lightbus.cli import target as targets

    logs.configure("error")
    app, outbox = targets.find_outbox(target)
    targets.load_handlers(app)
    found = relays(app)
    if outbox is not None:
        found = [one for one in found if one is outbox.relay]
    require(found, app)
    return [one.store for one in found]


def run(store: Store, question: Callable[[*Given], Awaitable[T]], *given: *Given) -> T:
    """Ask a database, in an event loop of asyncio: an AsyncEngine needs one."""
    import anyio

    from lightbus.cli.interrupt import waking_loop

    async def within() -> T:
        with waking_loop():
            try:
                return await question(*given)
            finally:
                engine: Any = getattr(store, "engine", None)
                if hasattr(engine, "sync_engine"):  # an AsyncEngine, whose connections belong to this event loop
                    await engine.dispose()

    try:
        return anyio.run(within, backend="asyncio")
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        sys.stderr.flush()
        os._exit(130)  # the interpreter would wait for a thread that waits for the database


def ask(store: Store, question: Callable[[*Given], Awaitable[T]], *given: *Given) -> T:
    """The same for a command that cannot go on without an answer.

    Raises:
        click.ClickException: the database does not answer, or has no table.
    """
    from lightbus.cli import tables

    try:
        return run(store, question, *given)
    except Exception as error:
        if not store.is_temporary(error):
            raise
        reason = tables.printable(store.describe(error)).rstrip(".")
        raise click.ClickException(f"The outbox in {store.name} cannot be used: {reason}.") from error


def one(stores: Sequence[Store], target: str) -> Store:
    """The only outbox: an id has a meaning within one.

    Raises:
        click.UsageError: there are several.
    """
    if len(stores) > 1:
        names = " and ".join(store.name for store in stores)
        raise click.UsageError(
            f"{target} has several outboxes ({names}), and an id belongs to one. Name it instead of the app, as in "
            f"{target.partition(':')[0]}:outbox."
        )
    return stores[0]
