"""The AMQP model in an SQLite file: one client's messages and who holds them.

A `Store` is one client's open file. `channel.py` adds channels, consumers and waiting. Whatever belongs together
happens in one transaction (`with store.transaction():`), which every change to the file needs.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, cast

import attrs
from amqp import exceptions as amqp_errors

from lightbus.transport import Properties, Publication, Unencodable
from lightbus.transport.sqlite.answers import (
    Arguments,
    Kind,
    access_refused,
    amqp_error,
    assert_same,
    check_queue_arguments,
    not_found,
    precondition_failed,
    resource_locked,
)
from lightbus.transport.sqlite.clock import Clock
from lightbus.transport.sqlite.file import File, cannot_open, explain
from lightbus.transport.sqlite.place import Place, standing_clocks
from lightbus.transport.sqlite.schema import (
    CLAIM_BYTES,
    CLAIM_MESSAGES,
    CLOSE_TIMEOUT,
    CONTENT,
    COUNT_OWNED,
    COUNT_READY,
    COUNT_SOME_READY,
    DROP_READY,
    DUE,
    EXPIRE_BATCH,
    FIRST_READY,
    GIVE_BACK,
    HOLD,
    HOLDINGS,
    INCREMENTAL,
    INSERT_CONTENT,
    INSERT_ENTRY,
    MAKE_DUE,
    MAX_BODY,
    NEXT_DUE,
    NOBODY,
    OWN_READY,
    PREDECLARED,
    READY,
    REQUEUE,
    RETRY_HELD,
    SPARE_PAGES,
    STATE,
)
from lightbus.transport.sqlite.tables import decode_table, encode_arguments, encode_properties
from lightbus.transport.sqlite.topology import MATCHES, Binding, Exchange, Queue, Topology
from lightbus.transport.sqlite.wake_pipe import WakePipe, is_alive, ring


class Outcome(Enum):
    """What became of a publication."""

    ROUTED = "routed"
    UNROUTED = "unrouted"  # no queue anywhere
    REFUSED = "refused"  # a full queue with x-overflow=reject-publish


def _seconds_to_live(queue: Queue, properties: Properties) -> float | None:
    own = properties.get("expiration")
    if own is None:
        return queue.ttl
    try:
        seconds = int(own) / 1000
    except ValueError:
        raise precondition_failed(f"invalid expiration '{own}': no_integer") from None
    if seconds < 0:
        raise precondition_failed(f"invalid expiration '{own}': value_negative")
    return seconds if queue.ttl is None else min(seconds, queue.ttl)


@attrs.frozen
class Claim:
    """A message that a client has taken."""

    id: int
    returns: int
    exchange: str
    routing_key: str
    properties: bytes
    body: bytes


class Store:
    """One client's open file. One thread uses it; only `wake_pipe.ring` is for others."""

    def __init__(self, place: Place) -> None:
        self.path = place.path
        self._folder = place.path.with_name(place.path.name + ".clients")
        self._file = File(place)
        self._version = -1
        self._topology = Topology({}, {})
        self._clock = Clock()
        self._advanced = 0.0  # seconds that tests have moved it
        self._last_entry = 0
        self._ring_for: set[int] = set()
        self._ring_all = False
        self._room: dict[int, int] = {}
        self._shrinks: bool | None = None
        self.client = -1
        try:
            self.wake_pipe = self._register()
            self.reap()
        except OSError as error:
            self._file.close()
            raise cannot_open(self._folder, error) from error
        except BaseException:
            self._file.close()
            raise

    # --- life -----------------------------------------------------------------------------

    def _register(self) -> WakePipe:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        # The pipe is made while the transaction keeps others from judging who is alive.
        with self._raw_transaction():
            self._clock.read(self.sql)
            self.client = self.sql("INSERT INTO clients DEFAULT VALUES").lastrowid or 0
            known = {self._wake_pipe_path(row[0]) for row in self.sql("SELECT id FROM clients")}
            for left_over in set(self._folder.glob("*.bell")) - known:
                left_over.unlink(missing_ok=True)
            path = self._wake_pipe_path(self.client)
            path.unlink(missing_ok=True)
            return WakePipe(path)

    def _wake_pipe_path(self, client: int) -> Path:
        return self._folder / f"{client}.bell"

    @property
    def is_open(self) -> bool:
        return not self._file.closed

    def close(self, acked: Sequence[int]) -> None:
        """Leave: what this client holds beyond `acked` goes back to its queues, its exclusive queues go."""
        if self._file.closed:
            return
        try:
            with self._file.lock:
                self.sql(f"PRAGMA busy_timeout = {CLOSE_TIMEOUT * 1000:.0f}")
                with self.transaction():
                    self.ack(acked)
                    self._remove_client(self.client)
        finally:
            self.wake_pipe.remove()
            self.drop()

    def drop(self) -> None:
        """Close the file without a word; others find the client dead."""
        self.wake_pipe.close()
        self._file.close()

    def reap(self) -> None:
        """Find clients that died, and return what they held."""
        clients = [row[0] for row in self._read("SELECT id FROM clients")]
        dead = [client for client in clients if client != self.client and not is_alive(self._wake_pipe_path(client))]
        if not dead:
            return
        with self.transaction():
            for client in dead:
                if self.sql("SELECT 1 FROM clients WHERE id = ?", client).fetchone():
                    self._remove_client(client)
        for client in dead:
            self._wake_pipe_path(client).unlink(missing_ok=True)

    def _remove_client(self, client: int) -> None:
        owned = [row[0] for row in self.sql("SELECT id FROM entries WHERE owner = ? ORDER BY id", client)]
        self.requeue(owned)
        for (tag,) in self.sql("SELECT tag FROM consumers WHERE client = ?", client).fetchall():
            self.remove_consumer(tag, client=client)
        for (name,) in self.sql("SELECT name FROM queues WHERE exclusive_to = ?", client).fetchall():
            self._remove_queue(self._topology.queues[name])
        self.sql("DELETE FROM clients WHERE id = ?", client)

    # --- transactions ---------------------------------------------------------------------

    # In these two the caller holds the file's lock: it is in a transaction.

    def sql(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        return self._file.get().execute(statement, parameters)

    def _many(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        self._file.get().executemany(statement, rows)

    def _read(self, statement: str, *parameters: Any) -> list[Any]:
        try:
            with self._file.lock:
                return self.sql(statement, *parameters).fetchall()
        except sqlite3.Error as error:
            raise explain(self.path, error) from error

    @contextlib.contextmanager
    def transaction(self) -> Generator[None]:
        """Everything inside happens, or nothing; those whom it concerns are woken afterwards."""
        with self._raw_transaction():
            self._refresh(*self.sql(STATE, self.client).fetchone())
            last_entry = self._last_entry
            yield
            if self._last_entry != last_entry:
                self.sql("UPDATE broker SET last_entry = ?", self._last_entry)
            if self._ring_all:
                self._ring_for.update(row[0] for row in self.sql("SELECT id FROM clients"))
        ring_for, self._ring_for, self._ring_all = self._ring_for, set(), False
        for client in ring_for:
            self._ring_bell(client)

    @contextlib.contextmanager
    def _raw_transaction(self, begin: str = "BEGIN IMMEDIATE") -> Generator[None]:
        with self._file.lock:
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
        self._version = -1  # what was declared in it never was
        self._ring_for.clear()
        self._ring_all = False
        if not self._file.closed and self._file.get().in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self.sql("ROLLBACK")

    def refresh(self) -> None:
        """See what others have changed."""
        state = self._read(STATE, self.client)[0]
        if state[0] == self._version:
            self._refresh(*state)
            return
        with self._raw_transaction("BEGIN"):  # one picture, whatever others commit meanwhile
            self._refresh(*self.sql(STATE, self.client).fetchone())

    def _refresh(self, version: int, clock: float, last_entry: int, known: int) -> None:
        if not known:
            raise amqp_error(
                amqp_errors.ConnectionForced,
                f"CONNECTION_FORCED - another process found this connection's pipe {self.wake_pipe.path} gone and took "
                "the connection for dead. Connect again; do not remove that folder while the broker is in use.",
            )
        self._advanced = clock
        self._last_entry = last_entry
        self._room.clear()
        if version != self._version:
            self._topology = self._load_topology()
            self._version = version

    def _ring_bell(self, client: int) -> None:
        if client == self.client:
            self.wake_pipe.ring()
        else:
            ring(self._wake_pipe_path(client))

    def now(self) -> float:
        return (standing_clocks.get(self.path) or self._clock.now()) + self._advanced

    def _wall_clock(self) -> float:
        """For people."""
        return self.now() if self.path in standing_clocks else time.time() + self._advanced

    def watch_clock(self) -> None:
        """Note it where somebody has set the machine's clock."""
        if self._clock.wall_was_set:
            with self.transaction():
                self._clock.note(self.sql)

    def stop_clock(self) -> None:
        """From now on only `advance_clock` moves it. For a broker in memory: others would not know."""
        # A whole second, so that sums of whole seconds meet exactly.
        standing_clocks[self.path] = float(math.floor(time.time()))

    def advance_clock(self, seconds: float) -> None:
        with self.transaction():
            self.sql("UPDATE broker SET clock = clock + ?", seconds)
            self._ring_all = True

    def sync_on_commit(self) -> None:
        """From now on a commit has reached the disk when it returns."""
        self._file.sync_on_commit()

    def give_back(self) -> None:
        """Make the file a little smaller where a backlog has left most of it empty.

        One that was made before Lightbus did this stays as large as it is, until a `VACUUM`.
        """
        if self._shrinks is None:
            self._shrinks = self._read("PRAGMA auto_vacuum")[0][0] == INCREMENTAL
        if not self._shrinks:
            return
        free, pages = self._read("PRAGMA freelist_count")[0][0], self._read("PRAGMA page_count")[0][0]
        if free <= SPARE_PAGES or 2 * free < pages:
            return
        try:
            with self._file.lock:  # as a script, since `execute` would do one step of it: one page
                self._file.get().executescript(f"PRAGMA incremental_vacuum({min(GIVE_BACK, free - SPARE_PAGES // 2)})")
        except sqlite3.Error as error:
            raise explain(self.path, error) from error
        self._read("PRAGMA wal_checkpoint(PASSIVE)")  # which cuts the file

    def check_place(self) -> None:
        """
        Raises:
            amqp.exceptions.RecoverableConnectionError: the file is not the one of its name any more.
        """
        self._file.check_place()

    def holdings(self) -> list[tuple[str, int, int, float | None]]:
        """For each queue that is not empty: its name, how many are ready, how many are not, when the first is due."""
        self.refresh()
        return self._read(HOLDINGS)

    def make_due(self, queues: Sequence[str], until: float) -> None:
        """What would expire in these queues until then (by `now`) expires now."""
        with self.transaction():
            ids = [self._topology.queues[name].id for name in queues if name in self._topology.queues]
            self._many(MAKE_DUE, [(self.now(), id, until) for id in ids])
            self._ring_all = True

    # --- topology -------------------------------------------------------------------------

    @property
    def topology(self) -> Topology:
        return self._topology

    def _load_topology(self) -> Topology:
        exchanges = {
            name: Exchange(name, kind, bool(durable), bool(auto_delete), bool(internal), decode_table(arguments))
            for name, kind, durable, auto_delete, internal, arguments in self.sql("SELECT * FROM exchanges")
        }
        queues = {
            name: Queue(id, name, bool(durable), owner, bool(auto_delete), decode_table(arguments))
            for id, name, durable, owner, auto_delete, arguments in self.sql("SELECT * FROM queues")
        }
        for source, kind, destination, routing_key, arguments in self.sql("SELECT * FROM bindings"):
            exchanges[source].bindings.append(Binding(kind, destination, routing_key, decode_table(arguments)))
        topology = Topology(exchanges, queues)
        for client, queue in self.sql("SELECT client, queue FROM consumers"):
            topology.queues_by_id[queue].clients.add(client)
        return topology

    def _topology_changed(self) -> None:
        self.sql("UPDATE broker SET topology = topology + 1")
        self._version += 1
        self._topology = self._load_topology()

    def exchange(self, name: str) -> Exchange:
        try:
            return self._topology.exchanges[name]
        except KeyError:
            raise not_found("exchange", name) from None

    def queue(self, name: str) -> Queue:
        """The queue, where this client may use it."""
        try:
            queue = self._topology.queues[name]
        except KeyError:
            raise not_found("queue", name) from None
        if queue.exclusive_to not in (None, self.client):
            raise resource_locked(name)
        return queue

    def declare_exchange(self, wanted: Exchange) -> None:
        current = self._topology.exchanges.get(wanted.name)
        if current is not None:
            assert_same("exchange", wanted.name, _exchange_facts(current), _exchange_facts(wanted))
            return
        if wanted.name.startswith("amq."):
            raise access_refused(f"exchange name '{wanted.name}' contains reserved prefix 'amq.*'")
        if wanted.type not in MATCHES:
            raise amqp_error(amqp_errors.InvalidCommand, f"COMMAND_INVALID - unknown exchange type '{wanted.type}'")
        self.sql(
            "INSERT INTO exchanges VALUES (?, ?, ?, ?, ?, ?)",
            wanted.name,
            wanted.type,
            wanted.durable,
            wanted.auto_delete,
            wanted.internal,
            encode_arguments(wanted.arguments),
        )
        self._topology_changed()

    def delete_exchange(self, name: str, if_unused: bool) -> None:
        exchange = self._topology.exchanges.get(name)
        if name == "" or name in PREDECLARED:
            raise access_refused(f"operation not permitted on the exchange '{name}'")
        if exchange is None:
            return
        if if_unused and exchange.bindings:
            raise precondition_failed(f"exchange '{name}' in vhost '/' in use")
        self.sql("DELETE FROM exchanges WHERE name = ?", name)
        self.sql("DELETE FROM bindings WHERE source = ?", name)
        self._unbind_destination("exchange", name)
        self._topology_changed()

    def bind(self, kind: Kind, destination: str, source: str, routing_key: str, arguments: Arguments | None) -> None:
        if source == "" or (kind == "exchange" and destination == ""):
            raise access_refused("operation not permitted on the default exchange")
        if kind == "queue":
            self.queue(destination)
        else:
            self.exchange(destination)
        self.exchange(source)
        row = (source, kind, destination, routing_key, encode_arguments(arguments))
        if self.sql("INSERT OR IGNORE INTO bindings VALUES (?, ?, ?, ?, ?)", *row).rowcount:
            self._topology_changed()
            self._release_held()

    def unbind(self, kind: Kind, destination: str, source: str, routing_key: str, arguments: Arguments | None) -> None:
        row = (source, kind, destination, routing_key, encode_arguments(arguments))
        where = "source = ? AND kind = ? AND destination = ? AND routing_key = ? AND arguments = ?"
        if self.sql(f"DELETE FROM bindings WHERE {where}", *row).rowcount:
            self._remove_unused_exchanges([source])
            self._topology_changed()

    def _unbind_destination(self, kind: Kind, name: str) -> None:
        where = "kind = ? AND destination = ?"
        sources = [row[0] for row in self.sql(f"SELECT DISTINCT source FROM bindings WHERE {where}", kind, name)]
        self.sql(f"DELETE FROM bindings WHERE {where}", kind, name)
        self._remove_unused_exchanges(sources)

    def _remove_unused_exchanges(self, names: Sequence[str]) -> None:
        for name in names:
            unused = """auto_delete AND NOT EXISTS (SELECT 1 FROM bindings WHERE source = name)"""
            if self.sql(f"DELETE FROM exchanges WHERE name = ? AND {unused}", name).rowcount:
                self._unbind_destination("exchange", name)

    def declare_queue(self, name: str, durable: bool, exclusive: bool, auto_delete: bool, arguments: Arguments) -> str:
        name = name or f"amq.gen-{uuid.uuid4().hex}"
        owner = self.client if exclusive else None
        check_queue_arguments(name, arguments)
        wanted = Queue(0, name, durable, owner, auto_delete, dict(arguments))
        if name in self._topology.queues:
            current = self.queue(name)
            if exclusive and current.exclusive_to is None:
                raise resource_locked(name)
            assert_same("queue", name, _queue_facts(current), _queue_facts(wanted))
            return name
        self.sql(
            "INSERT INTO queues (name, durable, exclusive_to, auto_delete, arguments) VALUES (?, ?, ?, ?, ?)",
            name,
            durable,
            owner,
            auto_delete,
            encode_arguments(arguments),
        )
        self._topology_changed()
        self._release_held()
        return name

    def count(self, queue: Queue) -> tuple[int, int]:
        """(ready messages, consumers)"""
        ready = self.sql(COUNT_READY, queue.id).fetchone()[0]
        consumers = self.sql("SELECT count(*) FROM consumers WHERE queue = ?", queue.id).fetchone()[0]
        return ready, consumers

    def purge(self, queue: Queue) -> int:
        return self.sql("DELETE FROM entries WHERE queue = ? AND owner IS NULL", queue.id).rowcount

    def delete_queue(self, name: str, if_unused: bool, if_empty: bool) -> int:
        if name not in self._topology.queues:
            return 0
        queue = self.queue(name)
        ready, consumers = self.count(queue)
        if if_unused and consumers:
            raise precondition_failed(f"queue '{name}' in vhost '/' in use")
        if if_empty and ready:
            raise precondition_failed(f"queue '{name}' in vhost '/' is not empty")
        self._remove_queue(queue)
        return ready

    def _remove_queue(self, queue: Queue) -> None:
        self._ring_for |= queue.clients  # so that their consumers learn that they are cancelled
        self.sql("DELETE FROM queues WHERE id = ?", queue.id)
        self.sql("DELETE FROM consumers WHERE queue = ?", queue.id)
        self.sql("DELETE FROM entries WHERE queue = ?", queue.id)
        self._unbind_destination("queue", queue.name)
        self._topology_changed()

    # --- consumers ------------------------------------------------------------------------

    def add_consumer(self, tag: str, queue: Queue, exclusive: bool) -> None:
        others = self.sql("SELECT exclusive FROM consumers WHERE queue = ?", queue.id).fetchall()
        if (exclusive and others) or any(other for (other,) in others):
            raise access_refused(f"queue '{queue.name}' in vhost '/' in exclusive use")
        self.sql("INSERT INTO consumers VALUES (?, ?, ?, ?)", self.client, tag, queue.id, exclusive)
        self._topology_changed()

    def remove_consumer(self, tag: str, *, client: int | None = None) -> None:
        client = self.client if client is None else client
        row = self.sql("SELECT queue FROM consumers WHERE client = ? AND tag = ?", client, tag).fetchone()
        if row is None:
            return
        self.sql("DELETE FROM consumers WHERE client = ? AND tag = ?", client, tag)
        queue = self._topology.queues_by_id[row[0]]
        if queue.auto_delete and self.count(queue)[1] == 0:
            self._remove_queue(queue)
        else:
            self._topology_changed()

    # --- messages in ----------------------------------------------------------------------

    def publish(self, publications: Sequence[Publication]) -> list[Outcome]:
        """Store each in every queue that its route leads to.

        Raises:
            Unencodable: one cannot be stored as it is.
        """
        rows: list[_Row] = []
        outcomes: list[Outcome] = []
        for publication in publications:
            try:
                outcomes.append(self._route_one(publication, rows))
            except ValueError as error:
                raise Unencodable(str(error), publication) from error
        self._insert(rows)
        self._trim(rows)
        return outcomes

    def _route_one(self, publication: Publication, rows: list[_Row]) -> Outcome:
        if len(publication.body) > MAX_BODY:
            raise precondition_failed(
                f"message size {len(publication.body)} is larger than configured max size {MAX_BODY}"
            )
        name, properties = publication.exchange, publication.properties
        if len(publication.routing_key.encode()) > 255:
            raise ValueError(f"the routing key {publication.routing_key!r} is longer than 255 bytes")
        if name and self.exchange(name).internal:
            raise access_refused(f"cannot publish to internal exchange '{name}' in vhost '/'")
        queues = self._topology.route(name, publication.routing_key, properties.get("headers") or {})
        open_queues = [queue for queue in queues if self._has_room(queue)]
        message = _Message(name, publication.routing_key, properties, bytes(publication.body))
        rows.extend(self._rows(message, open_queues))
        if not queues:
            return Outcome.UNROUTED
        return Outcome.ROUTED if len(open_queues) == len(queues) else Outcome.REFUSED

    def _has_room(self, queue: Queue) -> bool:
        if queue.max_length is None or not queue.refuses_overflow:
            return True
        if queue.id not in self._room:
            self._room[queue.id] = queue.max_length - self.sql(COUNT_READY, queue.id).fetchone()[0]
        self._room[queue.id] -= 1
        return self._room[queue.id] >= 0

    def _rows(self, message: _Message, queues: Sequence[Queue]) -> Iterator[_Row]:
        data = encode_properties(message.properties)
        for queue in queues:
            self._last_entry += 1
            to_live = _seconds_to_live(queue, message.properties)
            due = None if to_live is None else self.now() + to_live
            yield _Row(self._last_entry, queue, due, message, data)

    def _insert(self, rows: Sequence[_Row]) -> None:
        first_due = min((row.due for row in rows if row.due is not None), default=None)
        if first_due is not None:
            self._clock.note(self.sql)  # for a wall clock that is wrong after a boot
            next_due = self._next_due()
            # Clients that wait may have to wake earlier.
            self._ring_all = self._ring_all or next_due is None or first_due < next_due
        self._many(INSERT_ENTRY, [(row.id, row.queue.id, row.due, row.due) for row in rows])
        self._many(
            INSERT_CONTENT,
            [(row.id, row.message.exchange, row.message.routing_key, row.data, row.message.body) for row in rows],
        )
        for queue in {row.queue for row in rows}:
            self._ring_for |= queue.clients

    def _trim(self, rows: Sequence[_Row]) -> None:
        """Let the oldest go where a queue is over its length."""
        for queue in {row.queue for row in rows if row.queue.max_length is not None}:
            excess = self.sql(COUNT_READY, queue.id).fetchone()[0] - (queue.max_length or 0)
            if excess > 0 and not queue.refuses_overflow:
                oldest = "SELECT id FROM entries WHERE queue = ? AND owner IS NULL ORDER BY id LIMIT ?"
                for (id,) in self.sql(oldest, queue.id, excess).fetchall():
                    self._dead_letter(id, queue, "maxlen")

    # --- messages out ---------------------------------------------------------------------

    def has_ready(self, queue: Queue) -> bool:
        return bool(self._read(FIRST_READY, queue.id))

    def fair_share(self, queue: Queue, limit: int) -> int:
        """How many of the ready messages to claim, up to `limit`, so that each client that consumes the queue holds
        about the same number.
        """
        clients = len(queue.clients)
        if clients < 2:
            return limit
        held: dict[int, int] = {
            client: self.sql(COUNT_OWNED, client, queue.id).fetchone()[0] for client in queue.clients
        }
        mine, all_held = held.get(self.client, 0), sum(held.values())
        # With so many ready, the limit itself is not too much.
        enough = max(0, clients * (mine + limit) - all_held)
        ready: int = self.sql(COUNT_SOME_READY, queue.id, enough).fetchone()[0]
        return min(limit, max(0, math.ceil((all_held + ready) / clients) - mine))

    def claim(self, queue: Queue, limit: int, *, settled: bool = False, room: float = CLAIM_BYTES) -> list[Claim]:
        """Take the oldest ready messages, as acked ones where `settled`. No more, once they have filled the room."""
        claims: list[Claim] = []
        size = 0
        cursor = self.sql(READY, queue.id, min(limit, CLAIM_MESSAGES))
        for row in cursor:
            claims.append(Claim(*row))
            size += len(row[5])
            if size >= min(room, CLAIM_BYTES):
                break
        cursor.close()
        if claims and settled:
            self.sql(DROP_READY, queue.id, claims[-1].id)
        elif claims:
            self.sql(OWN_READY, self.client, queue.id, claims[-1].id)
        return claims

    def ack(self, entries: Sequence[int]) -> None:
        self._many("DELETE FROM entries WHERE id = ?", [(id,) for id in entries])

    def requeue(self, entries: Sequence[int]) -> None:
        """Put messages back in their places, or dead-letter those that came back too often."""
        for id in entries:
            row = self.sql("SELECT queue, returns, expires FROM entries WHERE id = ?", id).fetchone()
            if row is None:  # its queue was deleted
                continue
            queue = self._topology.queues_by_id[row[0]]
            self.sql(REQUEUE, id)
            self._ring_for |= queue.clients
            if queue.delivery_limit is not None and row[1] + 1 > queue.delivery_limit:
                self._dead_letter(id, queue, "delivery_limit")
            elif row[2] is not None:
                self._ring_all = True

    def reject(self, entries: Sequence[int]) -> None:
        """Dead-letter, or drop where the queue has no dead-letter exchange."""
        for id in entries:
            row = self.sql("SELECT queue FROM entries WHERE id = ?", id).fetchone()
            if row is not None:
                self._dead_letter(id, self._topology.queues_by_id[row[0]], "rejected")

    # --- time -----------------------------------------------------------------------------

    def next_due(self) -> float | None:
        """When (by `now`) something must happen without anybody asking."""
        return cast("float | None", self._read(NEXT_DUE)[0][0])

    def _next_due(self) -> float | None:
        return cast("float | None", self.sql(NEXT_DUE).fetchone()[0])

    def expire(self) -> bool:
        """Do what is due; False where more is left for another transaction."""
        due = self.sql(DUE, self.now(), EXPIRE_BATCH).fetchall()
        for id, queue, held_for in due:
            self._dead_letter(id, self._topology.queues_by_id[queue], held_for or "expired")
        return len(due) < EXPIRE_BATCH

    # --- dead letters ---------------------------------------------------------------------

    def _dead_letter(self, id: int, queue: Queue, reason: str) -> None:
        if queue.dead_letter_exchange is None:
            self.ack([id])
            return
        dead = self._dead_copy(id, queue, reason)
        targets = self._topology.route(dead.exchange, dead.routing_key, dead.properties["headers"])
        rows = list(self._rows(dead, _outside_cycles(targets, dead, reason)))
        full = [row for row in rows if not self._has_room(row.queue)]
        if queue.keeps_dead_letters and (full or not targets):
            # Held back rather than lost, out of the way of those behind it.
            self._hold(id, reason)
            return
        kept = [row for row in rows if row not in full]
        self._insert(kept)
        self.ack([id])
        self._trim(kept)

    def _hold(self, id: int, reason: str) -> None:
        shortest, longest = RETRY_HELD
        times = {"now": self.now(), "shortest": shortest, "longest": longest}
        self._file.get().execute(HOLD, {"nobody": NOBODY, "reason": reason, "id": id, **times})
        self._ring_all = True

    def _release_held(self) -> None:
        """There may be a way now for messages that could not be dead-lettered."""
        if self.sql("UPDATE entries SET due = ? WHERE owner = ?", self.now(), NOBODY).rowcount:
            self._ring_all = True

    def _dead_copy(self, id: int, queue: Queue, reason: str) -> _Message:
        exchange, routing_key, data, body = self.sql(CONTENT, id).fetchone()
        properties = decode_table(data)
        expiration = properties.pop("expiration", None)
        death: dict[str, Any] = {
            "count": 1,
            "reason": reason,
            "queue": queue.name,
            "time": datetime.fromtimestamp(self._wall_clock(), tz=UTC),
            "exchange": exchange,
            "routing-keys": [routing_key],
        }
        if expiration is not None:
            death["original-expiration"] = expiration
        properties["headers"] = _with_death(properties.get("headers") or {}, death)
        new_key = queue.dead_letter_routing_key
        return _Message(queue.dead_letter_exchange or "", routing_key if new_key is None else new_key, properties, body)


@attrs.frozen(eq=False)
class _Message:
    exchange: str
    routing_key: str
    properties: Properties
    body: bytes


@attrs.frozen(eq=False)
class _Row:
    id: int
    queue: Queue
    due: float | None
    message: _Message
    data: bytes


def _exchange_facts(exchange: Exchange) -> dict[str, Any]:
    facts = {name: getattr(exchange, name) for name in ("type", "durable", "auto_delete", "internal")}
    checked = {k: v for k, v in exchange.arguments.items() if k == "alternate-exchange"}
    return facts | checked


_CHECKED = frozenset(
    {
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
        "x-dead-letter-strategy",
        "x-delivery-limit",
        "x-expires",
        "x-max-length",
        "x-max-length-bytes",
        "x-message-ttl",
        "x-overflow",
        "x-queue-type",
    }
)


def _queue_facts(queue: Queue) -> dict[str, Any]:
    facts = {"durable": queue.durable, "exclusive": queue.exclusive_to is not None, "auto_delete": queue.auto_delete}
    return facts | {k: v for k, v in queue.arguments.items() if k in _CHECKED}


def _with_death(headers: Arguments, death: dict[str, Any]) -> dict[str, Any]:
    """The headers with RabbitMQ's record of a death in front; the same death again is counted."""
    earlier = list(headers.get("x-death") or [])
    for known in earlier:
        if (known.get("queue"), known.get("reason")) == (death["queue"], death["reason"]):
            earlier.remove(known)
            death = known | {"count": known.get("count", 1) + 1}
            break
    first = {f"x-first-death-{what}": death[what] for what in ("reason", "queue", "exchange")}
    last = {f"x-last-death-{what}": death[what] for what in ("reason", "queue", "exchange")}
    return {**first, **headers, **last, "x-death": [death, *earlier]}


def _outside_cycles(queues: Sequence[Queue], message: _Message, reason: str) -> list[Queue]:
    """Leave out queues that the message has died in before without ever being rejected, as RabbitMQ does:
    it would go round for ever."""
    if reason == "rejected":
        return list(queues)
    deaths = message.properties["headers"]["x-death"]
    return [queue for queue in queues if not _is_cycle(queue.name, deaths)]


def _is_cycle(queue: str, deaths: Sequence[Arguments]) -> bool:
    at = next((index for index, death in enumerate(deaths) if death.get("queue") == queue), None)
    return at is not None and all(death.get("reason") != "rejected" for death in deaths[: at + 1])
