"""One client's session with the file: its SQL, its transactions, its wake-ups and the broker's clock.

Every change to the file happens in `with session.transaction():`. The classes that know queues and messages share one
session: `Entries`, `DeadLetters`, `Deliveries`, `Declarations` and `Clients`. A `Store` owns them all.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from amqp import exceptions as amqp_errors

from lightbus.transport.kombu_calls import amqp_error
from lightbus.transport.sqlite.clock import Clock
from lightbus.transport.sqlite.file import File, cannot_open, explain
from lightbus.transport.sqlite.place import Place, standing_clocks
from lightbus.transport.sqlite.schema import STATE
from lightbus.transport.sqlite.topology import Topology, load_topology
from lightbus.transport.sqlite.wake_pipe import WakePipe, wake_client


class Session:
    """The file as one client has it open. One thread uses it; other threads may call only `wake_pipe.wake`."""

    wake_pipe: WakePipe
    """Shows other clients that this one is alive. Others write to it to wake this client."""

    def __init__(self, place: Place) -> None:
        self.path = place.path
        self.folder = place.path.with_name(place.path.name + ".clients")
        self.file = File(place)
        self.client = -1
        """The client's id in the table `clients`."""
        self.topology = Topology({}, {})
        """What is declared, as of the last `refresh` or transaction."""
        self.last_entry = 0
        """In a transaction: the highest id of an entry so far."""
        self.to_wake: set[int] = set()
        """In a transaction: the clients to wake once it is committed."""
        self.wake_everyone = False
        """In a transaction: wake all clients once it is committed."""
        self.room: dict[int, int] = {}
        """In a transaction: how many more messages a queue with a length limit takes, by its id."""
        self._version = -1  # of the topology
        self._clock = Clock()
        self._advanced = 0.0  # seconds that tests have moved the clock
        try:
            self._register()
        except OSError as error:
            self.file.close()
            raise cannot_open(self.folder, error) from error
        except BaseException:
            self.file.close()
            raise

    def _register(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        # The pipe is created inside the transaction: until then, no other client may look for it.
        with self._raw_transaction():
            self._clock.read(self.sql)
            self.client = self.sql("INSERT INTO clients DEFAULT VALUES").lastrowid or 0
            known = {self.pipe_path(row[0]) for row in self.sql("SELECT id FROM clients")}
            for left_over in set(self.folder.glob("*.bell")) - known:
                left_over.unlink(missing_ok=True)
            path = self.pipe_path(self.client)
            path.unlink(missing_ok=True)
            self.wake_pipe = WakePipe(path)

    def pipe_path(self, client: int) -> Path:
        """Where the client's named pipe is. Other versions of Lightbus look for this suffix, too."""
        return self.folder / f"{client}.bell"

    @property
    def is_open(self) -> bool:
        return not self.file.closed

    def drop(self) -> None:
        """Close the file without changing it. Other clients find this one dead, and requeue what it holds."""
        self.wake_pipe.close()
        self.file.close()

    # --- SQL ------------------------------------------------------------------------------

    # In the first three, the caller holds the file's lock: it is in a transaction.

    def sql(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        return self.file.get().execute(statement, parameters)

    def sql_named(self, statement: str, parameters: dict[str, Any]) -> sqlite3.Cursor:
        return self.file.get().execute(statement, parameters)

    def many(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        self.file.get().executemany(statement, rows)

    def read(self, statement: str, *parameters: Any) -> list[Any]:
        """The rows of one query, outside of a transaction.

        Raises:
            BrokerFileError: the file cannot be used.
            amqp.exceptions.RecoverableConnectionError: the session is closed, or the file was locked for too long.
        """
        try:
            with self.file.lock:
                return self.sql(statement, *parameters).fetchall()
        except sqlite3.Error as error:
            raise explain(self.path, error) from error

    # --- transactions ---------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Commit everything inside, or nothing. Afterwards, wake the clients in `to_wake`."""
        with self._raw_transaction():
            self._update(*self.sql(STATE, self.client).fetchone())
            last_entry = self.last_entry
            yield
            if self.last_entry != last_entry:
                self.sql("UPDATE broker SET last_entry = ?", self.last_entry)
            if self.wake_everyone:
                self.to_wake.update(row[0] for row in self.sql("SELECT id FROM clients"))
        to_wake, self.to_wake, self.wake_everyone = self.to_wake, set(), False
        for client in to_wake:
            self._wake(client)

    @contextlib.contextmanager
    def _raw_transaction(self, begin: str = "BEGIN IMMEDIATE") -> Generator[None]:
        with self.file.lock:
            try:
                self.sql(begin)
                yield
                self.sql("COMMIT")
            except BaseException as error:
                self._roll_back()
                if isinstance(error, sqlite3.Error):
                    raise explain(self.path, error) from error
                raise

    def _roll_back(self) -> None:
        self._version = -1  # `topology` may have what was declared in this transaction: read it again
        self.to_wake.clear()
        self.wake_everyone = False
        if not self.file.closed and self.file.get().in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self.sql("ROLLBACK")

    def refresh(self) -> None:
        """Read what other clients have declared."""
        state = self.read(STATE, self.client)[0]
        if state[0] == self._version:
            self._update(*state)
            return
        with self._raw_transaction("BEGIN"):  # one consistent view, whatever others commit meanwhile
            self._update(*self.sql(STATE, self.client).fetchone())

    def _update(self, version: int, clock: float, last_entry: int, known: int) -> None:
        if not known:
            raise amqp_error(
                amqp_errors.ConnectionForced,
                f"CONNECTION_FORCED - another process found this connection's pipe {self.wake_pipe.path} gone and took "
                "the connection for dead. Connect again; do not remove that folder while the broker is in use.",
            )
        self._advanced = clock
        self.last_entry = last_entry
        self.room.clear()
        if version != self._version:
            self.topology = load_topology(self.sql)
            self._version = version

    def topology_changed(self) -> None:
        """In a transaction, after a change of what is declared: let every client read it again."""
        self.sql("UPDATE broker SET topology = topology + 1")
        self._version += 1
        self.topology = load_topology(self.sql)

    def _wake(self, client: int) -> None:
        if client == self.client:
            self.wake_pipe.wake()
        else:
            wake_client(self.pipe_path(client))

    # --- the clock ------------------------------------------------------------------------

    def now(self) -> float:
        """The broker's time in seconds. Delays and TTLs use it."""
        return (standing_clocks.get(self.path) or self._clock.now()) + self._advanced

    def wall_clock(self) -> float:
        """The time of day in seconds since 1970, for what people read."""
        return self.now() if self.path in standing_clocks else time.time() + self._advanced

    def note_clock(self) -> None:
        """In a transaction: store the time, for a boot with a wrong wall clock."""
        self._clock.note(self.sql)

    def watch_clock(self) -> None:
        """Store the time again if the machine's clock was set."""
        if self._clock.wall_was_set:
            with self.transaction():
                self.note_clock()

    def stop_clock(self) -> None:
        """Let only `advance_clock` move the clock from now on. Only for `memory://`: other processes do not see it."""
        # A whole second, so that sums of whole seconds are exact.
        standing_clocks[self.path] = float(math.floor(time.time()))

    def advance_clock(self, seconds: float) -> None:
        with self.transaction():
            self.sql("UPDATE broker SET clock = clock + ?", seconds)
            self.wake_everyone = True
