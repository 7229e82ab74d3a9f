"""Where the pages get what they show from: a broker, a snapshot file, or both. All calls block: pages use threads."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import attrs

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.catalog import catalog as catalogs
from lightbus.catalog import live, storage
from lightbus.catalog.catalog import Catalog
from lightbus.catalog.contract import Contract
from lightbus.catalog.live import Live
from lightbus.connection.dial import BrokerAddresses
from lightbus.inspection.states import QueueState

FRESH = 3.0
"""Seconds for which the same answer of the broker is shown."""


@attrs.frozen
class Snapshot:
    """What is known about the bus at one moment."""

    catalog: Catalog
    live: Live | None
    """None: no broker is used, or it did not answer."""
    problem: str
    """Why the contracts or the state of the queues could not be read; "" if they could."""
    at: float
    """When it was read, seconds since 1970; 0 if never."""
    seconds: float
    """How long reading took."""

    def state(self, queue: str) -> QueueState | None:
        """The state of a queue; None if unknown."""
        return None if self.live is None else self.live.queue(queue)

    def is_down(self, contract: Contract) -> bool:
        """Whether it is known that no worker consumes an app's queues."""
        return bool(contract.handlers) and self.live is not None and self.live.consumers(contract) == 0

    def dead(self, contract: Contract) -> int | None:
        """The number of an app's dead letters; None if unknown."""
        return None if self.live is None else self.live.dead(contract)


NOTHING = Snapshot(Catalog(0.0, []), None, "", 0.0, 0.0)


class Source:
    """The bus that is shown."""

    def __init__(self, broker: BrokerAddresses | None, file: Path | None = None, app: Lightbus | None = None) -> None:
        """
        Args:
            broker: None: only the file is shown.
            file: a snapshot in the place of the contracts on the broker.
            app: the app whose code is known, and whose broker this is.
        """
        self.broker = broker
        self.file = file
        self.app = app
        self._lock = threading.Lock()
        self._snapshot = NOTHING
        self._until = 0.0

    @property
    def place(self) -> str:
        """The broker without its password, or the file."""
        if self.broker is None:
            return str(self.file)
        return self.broker.masked if self.file is None else f"{self.broker.masked}, contracts of {self.file}"

    def snapshot(self) -> Snapshot:
        """The contracts and the state of the queues, up to `FRESH` seconds old. If the broker cannot be used, the
        `problem` says why, and the contracts are the last ones that could be read."""
        with self._lock:  # one question at a time, whose answer is for all who wait
            if time.monotonic() >= self._until:
                self._snapshot = self._read()
                self._until = time.monotonic() + FRESH
            return self._snapshot

    def expire(self) -> None:
        """Read again for the next page."""
        self._until = 0.0

    def _read(self) -> Snapshot:
        began, state, problem = time.monotonic(), None, ""
        catalog = self._snapshot.catalog
        try:
            if self.file is not None:
                catalog = catalogs.from_file(self.file)
            elif self.broker is not None:
                catalog = storage.read(self.broker)
        except errors.LightbusError as error:
            problem = str(error)
        try:
            if self.broker is not None and not self._is_unusable(problem):
                state = live.ask(self.broker, catalog)
        except errors.LightbusError as error:
            problem = problem or str(error)
        at = time.time() if not problem else self._snapshot.at
        return Snapshot(catalog, state, problem, at, time.monotonic() - began)

    def _is_unusable(self, problem: str) -> bool:
        """Whether asking for the queues has no prospect, or nothing to ask for."""
        return bool(problem) and not self._snapshot.catalog.contracts

    def app_named(self, name: str) -> Lightbus:
        """The app, to read its dead letters: with its code if that is known, otherwise only its name.

        Raises:
            errors.InvalidName: no app can have this name.
            errors.CatalogError: there is no broker.
        """
        if self.broker is None:
            raise errors.CatalogError(
                "This page shows a file, so it has no dead letters and no live events. Start `lightbus web` without "
                "--from, or with MODULE:ATTR."
            )
        if self.app is not None and self.app.name == name:
            return self.app
        return Lightbus(name, url=[one.url for one in self.broker.addresses])
