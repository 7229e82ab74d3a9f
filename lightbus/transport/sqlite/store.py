"""The AMQP model in an SQLite file: exchanges, bindings, queues, messages and who holds them.

A `Store` is one client's open file. All SQL is here; `channel.py` adds channels, consumers and waiting.
Whatever belongs together happens in one transaction (`with store.transaction():`), which every
change to the file needs.

A client is alive as long as its *bell*, a named pipe in the folder `<file>.clients`, is open for
reading: the kernel closes it when the process dies, however it dies, and leaves it open when the
process only sleeps. Ringing it (writing one byte) wakes the client.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import fcntl
import math
import os
import select
import shutil
import sqlite3
import tempfile
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

import attrs
import msgspec
import platformdirs
from amqp import exceptions as amqp_errors

from lightbus import errors
from lightbus.pattern import topic_matches
from lightbus.transport import Properties, Publication, Unencodable

APPLICATION_ID = 0x4C627573  # "Lbus": what makes a file ours
SCHEMA_VERSION = 1
LOCK_TIMEOUT = 10.0  # seconds to wait for another client's transaction
CLOSE_TIMEOUT = 3.0  # seconds likewise, when closing: others will find out anyway
RETRY_HELD = (1.0, 60.0)  # seconds until a message that could not be dead-lettered is tried again: at first, at last
MAX_BODY = 128 * 1024 * 1024  # bytes: RabbitMQ's own default until 3.13
CLAIM_MESSAGES = 100  # at most this many a claim, so that competing consumers get their share
CLAIM_BYTES = 16 * 1024 * 1024
SPARE_PAGES = 1024  # free pages that the file may have in any case: 4 MB
GIVE_BACK = 1000  # pages a transaction: 4 MB, for which others wait some 30 ms
EXPIRE_BATCH = 500  # messages a transaction, so that others get their turn
CACHED_ROUTES = 20_000
INCREMENTAL = 2  # of auto_vacuum
NOBODY = 0  # the owner of a message that is held back: neither ready nor with a client

# An entry is a message in one queue; its content lies apart, so that claiming a large message does
# not rewrite it. `owner` is NULL while it is ready. `due` is when something must happen to it without
# anybody asking: it expires, or is dead-lettered at last.
SCHEMA = """
CREATE TABLE broker (
    topology INTEGER NOT NULL,     -- counts changes, so that clients know when to read it again
    clock REAL NOT NULL,           -- seconds that tests have moved the clock
    last_entry INTEGER NOT NULL    -- ids are never used twice: an old one cannot ack a new message
);
CREATE TABLE clients (id INTEGER PRIMARY KEY AUTOINCREMENT);
CREATE TABLE exchanges (
    name TEXT PRIMARY KEY,
    type TEXT NOT NULL,
    durable INTEGER NOT NULL,
    auto_delete INTEGER NOT NULL,
    internal INTEGER NOT NULL,
    arguments BLOB NOT NULL
);
CREATE TABLE queues (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    durable INTEGER NOT NULL,
    exclusive_to INTEGER,
    auto_delete INTEGER NOT NULL,
    arguments BLOB NOT NULL
);
CREATE TABLE bindings (
    source TEXT NOT NULL,
    kind TEXT NOT NULL,            -- of the destination: 'queue' or 'exchange'
    destination TEXT NOT NULL,
    routing_key TEXT NOT NULL,
    arguments BLOB NOT NULL,
    PRIMARY KEY (source, kind, destination, routing_key, arguments)
);
CREATE TABLE consumers (
    client INTEGER NOT NULL,
    tag TEXT NOT NULL,
    queue INTEGER NOT NULL,
    exclusive INTEGER NOT NULL,
    PRIMARY KEY (client, tag)
);
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    queue INTEGER NOT NULL,
    owner INTEGER,
    due REAL,
    expires REAL,
    returns INTEGER NOT NULL DEFAULT 0,
    held_for TEXT,                 -- the reason of a dead-lettering that has yet to succeed
    held_since REAL
);
CREATE INDEX ready ON entries (queue) WHERE owner IS NULL;
CREATE INDEX owned ON entries (owner) WHERE owner IS NOT NULL;
CREATE INDEX due ON entries (due) WHERE due IS NOT NULL;
CREATE TABLE contents (
    id INTEGER PRIMARY KEY,
    exchange TEXT NOT NULL,
    routing_key TEXT NOT NULL,
    properties BLOB NOT NULL,
    body BLOB NOT NULL
);
CREATE TRIGGER content_goes_with_entry AFTER DELETE ON entries BEGIN
    DELETE FROM contents WHERE id = old.id;
END;
INSERT INTO broker VALUES (1, 0, 0)
"""
# Delays go by a clock that nobody sets: the machine's steady one (`_Clock`). It starts again with each boot, so that a
# row says what the broker's clock, the wall's and the steady one were at one moment. The last row is the newest. Not a
# part of the schema's version: what does not know it goes by the wall's clock.
CLOCKS = """
CREATE TABLE IF NOT EXISTS clocks (
    domain TEXT PRIMARY KEY,       -- the boot, and the container, in which the steady clock counts
    time REAL NOT NULL,
    wall REAL NOT NULL,
    steady REAL NOT NULL
)
"""
NOTE_CLOCK = "REPLACE INTO clocks VALUES (?, ?, ?, ?)"
KNOWN_CLOCK = "SELECT time, wall, steady FROM clocks WHERE domain = ?"
NEWEST_CLOCK = "SELECT time, wall FROM clocks ORDER BY rowid DESC LIMIT 1"
FORGET_CLOCKS = "DELETE FROM clocks WHERE rowid NOT IN (SELECT rowid FROM clocks ORDER BY rowid DESC LIMIT 10)"
PREDECLARED = {
    "amq.direct": "direct",
    "amq.fanout": "fanout",
    "amq.headers": "headers",
    "amq.match": "headers",
    "amq.topic": "topic",
}

STATE = "SELECT topology, clock, last_entry, EXISTS (SELECT 1 FROM clients WHERE id = ?) FROM broker"
HOLDINGS = """
SELECT queues.name, sum(owner IS NULL), sum(owner IS NOT NULL), min(due) FROM entries
JOIN queues ON queues.id = entries.queue GROUP BY queues.name ORDER BY queues.name
"""
MAKE_DUE = "UPDATE entries SET due = min(due, ?) WHERE queue = ? AND owner IS NULL AND due <= ?"
FIRST_READY = "SELECT 1 FROM entries WHERE queue = ? AND owner IS NULL LIMIT 1"
COUNT_READY = "SELECT count(*) FROM entries WHERE queue = ? AND owner IS NULL"
COUNT_SOME_READY = "SELECT count(*) FROM (SELECT 1 FROM entries WHERE queue = ? AND owner IS NULL LIMIT ?)"
COUNT_OWNED = "SELECT count(*) FROM entries WHERE owner = ? AND queue = ?"
READY = """
    SELECT e.id, e.returns, c.exchange, c.routing_key, c.properties, c.body
    FROM entries e JOIN contents c ON c.id = e.id
    WHERE e.queue = ? AND e.owner IS NULL ORDER BY e.id LIMIT ?
"""
OWN_READY = "UPDATE entries SET owner = ?, due = NULL WHERE queue = ? AND owner IS NULL AND id <= ?"
DROP_READY = "DELETE FROM entries WHERE queue = ? AND owner IS NULL AND id <= ?"
NEXT_DUE = "SELECT min(due) FROM entries WHERE due IS NOT NULL"
DUE = "SELECT id, queue, held_for FROM entries WHERE due <= ? ORDER BY due, id LIMIT ?"
CONTENT = "SELECT exchange, routing_key, properties, body FROM contents WHERE id = ?"
INSERT_ENTRY = "INSERT INTO entries (id, queue, due, expires) VALUES (?, ?, ?, ?)"
INSERT_CONTENT = "INSERT INTO contents (id, exchange, routing_key, properties, body) VALUES (?, ?, ?, ?, ?)"
# Each attempt waits as long as the message has been held so far: soon at first, and little work for many.
HOLD = """
    UPDATE entries SET owner = :nobody, held_for = :reason, held_since = coalesce(held_since, :now),
        due = :now + min(max(:now - coalesce(held_since, :now), :shortest), :longest)
    WHERE id = :id
"""
REQUEUE = "UPDATE entries SET owner = NULL, due = expires, returns = returns + 1 WHERE id = ?"

Kind = Literal["queue", "exchange"]
Arguments = Mapping[str, Any]


class Outcome(Enum):
    """What became of a publication."""

    ROUTED = "routed"
    UNROUTED = "unrouted"  # no queue anywhere
    REFUSED = "refused"  # a full queue with x-overflow=reject-publish


# --- where the file is ------------------------------------------------------------------------


@attrs.frozen
class Place:
    """The file that a URL names."""

    path: Path
    in_memory: bool


_memory_folders: dict[str, Path] = {}
_memory_lock = threading.Lock()
_standing_clocks: dict[Path, float] = {}  # of brokers in memory: where their clocks stand, before they are advanced


def locate(url: str) -> Place:
    """The file that `url` names.

    `sqlite:///relative.db` and `sqlite:////absolute/path.db` (the first slash ends the empty host,
    as in SQLAlchemy), `sqlite://` for the user's own file, `memory://` and `memory://name`.

    Raises:
        InvalidURL: it has a host, a query or another scheme.
    """
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        # Options may be secrets, here as before a host.
        raise errors.InvalidURL(
            f"The broker URL '{parts.scheme}://...?...' has options, and the embedded broker takes none. Remove them."
        )
    if parts.scheme == "memory":
        return Place(_memory_file(unquote(parts.netloc + parts.path).strip("/")), in_memory=True)
    if parts.scheme != "sqlite":
        raise errors.InvalidURL(
            f"Broker URL {url!r} is not the embedded broker's: use 'sqlite:///path', 'sqlite://' or 'memory://'."
        )
    if parts.netloc:
        host = parts.netloc.rpartition("@")[2]  # without what may be a password
        raise errors.InvalidURL(
            f"The broker URL 'sqlite://{host}{parts.path}' names the host {host!r}, and a file has none. "
            f"Use 'sqlite:///{host}{parts.path}' (relative) or four slashes for an absolute path."
        )
    if parts.path in ("", "/"):
        return Place(platformdirs.user_state_path("lightbus") / "bus.db", in_memory=False)
    return Place(Path(os.path.abspath(os.fsdecode(unquote_to_bytes(parts.path[1:])))), in_memory=False)


def short_path(path: Path) -> Path:
    """A path as one would type it in a shell."""
    home = Path.home()
    return Path("~", path.relative_to(home)) if home in path.parents else path


def _memory_file(name: str) -> Path:
    # A private file without fsync, rather than SQLite's shared memory mode, whose table locks fail
    # instead of waiting: one code path, and the same promises.
    with _memory_lock:
        if name not in _memory_folders:
            _memory_folders[name] = Path(tempfile.mkdtemp(prefix="lightbus-"))
        return _memory_folders[name] / "bus.db"


def forget_memory(name: str) -> None:
    """Remove what `memory://name` holds. For tests that use many; the rest go when the process ends."""
    with _memory_lock:
        folder = _memory_folders.pop(name, None)
    if folder is not None:
        _standing_clocks.pop(folder / "bus.db", None)
        shutil.rmtree(folder, ignore_errors=True)


@atexit.register
def _remove_memory_folders() -> None:
    for name in list(_memory_folders):
        forget_memory(name)


# --- properties and arguments as bytes --------------------------------------------------------

_SIMPLE = frozenset({str, int, bool, float, bytes, type(None)})
_TIME = 1  # msgpack extension: seconds since 1970
PROPERTIES = frozenset(
    {
        "app_id",
        "cluster_id",
        "content_encoding",
        "content_type",
        "correlation_id",
        "delivery_mode",
        "expiration",
        "headers",
        "message_id",
        "priority",
        "reply_to",
        "timestamp",
        "type",
        "user_id",
    }
)
_encoder = msgspec.msgpack.Encoder()


def _read_extension(code: int, data: memoryview) -> datetime:
    return datetime.fromtimestamp(int.from_bytes(data, "big", signed=True), tz=UTC)


_decoder = msgspec.msgpack.Decoder(dict[str, Any], ext_hook=_read_extension)


def encode_properties(properties: Properties) -> bytes:
    """Write a message's properties.

    Raises:
        ValueError: one is not known, or of a type that AMQP has no word for.
    """
    if not properties.keys() <= PROPERTIES:
        raise ValueError(f"AMQP knows no property {sorted(properties.keys() - PROPERTIES)[0]!r}")
    try:
        return _encoder.encode(_plain(properties))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"the properties {properties!r} cannot be encoded: {error}") from error


def decode_table(data: bytes) -> Properties:
    return _decoder.decode(data)


def _plain(value: Any) -> Any:
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Arguments", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    if isinstance(value, datetime):
        seconds = int((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp())
        return msgspec.msgpack.Ext(_TIME, seconds.to_bytes(8, "big", signed=True))
    return value


def _encode_arguments(arguments: Arguments | None) -> bytes:
    try:
        return _encoder.encode(_plain(dict(sorted((arguments or {}).items()))))
    except (TypeError, OverflowError) as error:
        raise amqp_error(amqp_errors.FrameSyntaxError, f"{arguments!r} cannot be sent: {error}") from error


# --- topology ---------------------------------------------------------------------------------


@attrs.define(eq=False)
class Queue:
    id: int
    name: str
    durable: bool
    exclusive_to: int | None
    auto_delete: bool
    arguments: dict[str, Any]
    clients: set[int] = attrs.Factory(set)  # who consumes from it

    ttl: float | None = None
    dead_letter_exchange: str | None = None
    dead_letter_routing_key: str | None = None
    keeps_dead_letters: bool = False
    max_length: int | None = None
    refuses_overflow: bool = False
    delivery_limit: int | None = None

    def __attrs_post_init__(self) -> None:
        get = self.arguments.get
        ttl = get("x-message-ttl")
        self.ttl = None if ttl is None else ttl / 1000
        self.dead_letter_exchange = get("x-dead-letter-exchange")
        self.dead_letter_routing_key = get("x-dead-letter-routing-key")
        self.keeps_dead_letters = get("x-dead-letter-strategy") == "at-least-once"
        self.max_length = get("x-max-length")
        self.refuses_overflow = get("x-overflow") in ("reject-publish", "reject-publish-dlx")
        limit = get("x-delivery-limit")
        self.delivery_limit = limit if limit is not None and limit >= 0 else None


@attrs.define(eq=False)
class Exchange:
    name: str
    type: str
    durable: bool
    auto_delete: bool
    internal: bool
    arguments: dict[str, Any]
    bindings: list[Binding] = attrs.Factory(list)


@attrs.define(eq=False)
class Binding:
    kind: Kind
    destination: str
    routing_key: str
    arguments: dict[str, Any]


class Topology:
    """A picture of what is declared, which routes without asking the file."""

    def __init__(self, exchanges: dict[str, Exchange], queues: dict[str, Queue]) -> None:
        self.exchanges = exchanges
        self.queues = queues
        self.queues_by_id = {queue.id: queue for queue in queues.values()}
        self._routes: dict[tuple[str, str], list[Queue]] = {}

    def route(self, exchange: str, routing_key: str, headers: Arguments) -> list[Queue]:
        """Each queue that gets the message, once, however many ways lead there."""
        known = self._routes.get((exchange, routing_key))
        if known is not None:
            return known
        route, by_headers = self._walk(exchange, routing_key, headers)
        if not by_headers and len(self._routes) < CACHED_ROUTES:
            self._routes[exchange, routing_key] = route
        return route

    def _walk(self, start: str, routing_key: str, headers: Arguments) -> tuple[list[Queue], bool]:
        if start == "":
            queue = self.queues.get(routing_key)
            return ([queue] if queue else []), False
        queues: dict[str, Queue] = {}
        seen, ahead = {start}, [start]
        by_headers = False
        while ahead:
            exchange = self.exchanges.get(ahead.pop())
            if exchange is None:
                continue
            by_headers = by_headers or exchange.type == "headers"
            for kind, name in self._next(exchange, routing_key, headers):
                if kind == "queue":
                    queues[name] = self.queues[name]
                elif name not in seen:
                    seen.add(name)
                    ahead.append(name)
        return list(queues.values()), by_headers

    def _next(self, exchange: Exchange, routing_key: str, headers: Arguments) -> set[tuple[Kind, str]]:
        match = MATCHES[exchange.type]
        found: set[tuple[Kind, str]] = {
            (b.kind, b.destination) for b in exchange.bindings if match(b, routing_key, headers)
        }
        alternate = exchange.arguments.get("alternate-exchange")
        if not found and alternate is not None:
            return {("exchange", alternate)}
        return found


def _headers_match(binding: Binding, _: str, headers: Arguments) -> bool:
    mode = binding.arguments.get("x-match", "all")
    wanted = {k: v for k, v in binding.arguments.items() if not k.startswith("x-") or (mode.endswith("-with-x"))}
    wanted.pop("x-match", None)
    hits = (key in headers and (value is None or _same(value, headers[key])) for key, value in wanted.items())
    return any(hits) if mode.startswith("any") else all(hits)


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)  # 1 is not True, as in AMQP


MATCHES: dict[str, Callable[[Binding, str, Arguments], bool]] = {
    "direct": lambda binding, key, _: binding.routing_key == key,
    "topic": lambda binding, key, _: topic_matches(binding.routing_key, key),
    "fanout": lambda binding, key, _: True,
    "headers": _headers_match,
}


# --- AMQP's errors, in RabbitMQ's words -------------------------------------------------------


def amqp_error(kind: Any, text: str) -> Exception:
    """One of `amqp.exceptions`, which are not typed."""
    error: Exception = kind(text, reply_code=kind.code or None)
    return error


def not_found(kind: Kind, name: str) -> Exception:
    return amqp_error(amqp_errors.NotFound, f"NOT_FOUND - no {kind} '{name}' in vhost '/'")


def access_refused(what: str) -> Exception:
    return amqp_error(amqp_errors.AccessRefused, f"ACCESS_REFUSED - {what}")


def precondition_failed(what: str) -> Exception:
    return amqp_error(amqp_errors.PreconditionFailed, f"PRECONDITION_FAILED - {what}")


def _locked(name: str) -> Exception:
    return amqp_error(
        amqp_errors.ResourceLocked,
        f"RESOURCE_LOCKED - cannot obtain exclusive access to locked queue '{name}' in vhost '/'. It could be "
        "originally declared on another connection or the exclusive property value does not match that of the "
        "original declaration.",
    )


_AMQP_TYPES = {str: "longstr", bool: "bool", int: "signedint", float: "double"}
_NONE = object()


def _assert_same(kind: Kind, name: str, current: Arguments, received: Arguments) -> None:
    for key in (*current, *(key for key in received if key not in current)):
        old, new = current.get(key, _NONE), received.get(key, _NONE)
        if old is not _NONE and new is not _NONE and _same(old, new):
            continue
        bare = old is not _NONE and new is not _NONE
        raise precondition_failed(
            f"inequivalent arg '{key}' for {kind} '{name}' in vhost '/': "
            f"received {_spell(new, bare)} but current is {_spell(old, bare)}"
        )


def _spell(value: Any, bare: bool) -> str:
    if value is _NONE:
        return "none"
    word = str(value).lower() if isinstance(value, bool) else str(value)
    return f"'{word}'" if bare else f"the value '{word}' of type '{_AMQP_TYPES.get(type(value), 'table')}'"


_COUNTS = ("x-message-ttl", "x-max-length", "x-expires", "x-max-length-bytes")


def _check_queue_arguments(name: str, arguments: Arguments) -> None:
    for key in _COUNTS:
        value = arguments.get(key, 0)
        if type(value) is not int or value < 0:
            raise precondition_failed(f"invalid arg '{key}' for queue '{name}' in vhost '/': {value!r}")
    if "x-dead-letter-routing-key" in arguments and "x-dead-letter-exchange" not in arguments:
        raise precondition_failed(
            f"invalid arg 'x-dead-letter-routing-key' for queue '{name}' in vhost '/': routing_key_but_no_dlx_defined"
        )


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


# --- bells ------------------------------------------------------------------------------------


_bells: weakref.WeakSet[Bell] = weakref.WeakSet()


class Bell:
    """A client's named pipe: its sign of life, and what others ring to wake it."""

    _reader = _writer = -1

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()  # a write after the close might go to another file of that number
        os.mkfifo(path, 0o600)
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        # A writer of our own: without one the pipe would report its end each time another has rung.
        self._writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)
        _bells.add(self)

    def ring(self) -> None:
        """From any thread, also after `close`."""
        with self._lock, contextlib.suppress(BlockingIOError):  # a full pipe wakes as well
            if self._writer >= 0:
                os.write(self._writer, b"!")

    def wait(self, seconds: float) -> bool:
        """Sleep until rung, at most so long; whether it was."""
        # Rounded up: a poll that returns too early would spin until the time has come.
        if not self._poll.poll(int(seconds * 1000 + 0.999) if seconds > 0 else 0):
            return False
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 65536)
        return True

    def remove(self) -> None:
        """Remove the pipe, unless another client's is there: of a file that replaced this one's."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            if self._reader >= 0 and os.path.samestat(os.fstat(self._reader), os.stat(self.path)):
                self.path.unlink()

    def close(self) -> None:
        with self._lock:
            for fd in (self._reader, self._writer):
                if fd >= 0:
                    os.close(fd)
            self._reader = self._writer = -1

    def close_in_child(self) -> None:
        """Close after a fork, when the lock may be held by a thread that is only in the parent."""
        self._lock = threading.RLock()
        self.close()

    def __del__(self) -> None:
        self.close()  # a connection that was forgotten must not look alive


def _ring(path: Path) -> None:
    """Wake another client. Where that fails it is dead, or finds out by itself at its next tick."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            os.write(fd, b"!")
        finally:
            os.close(fd)


def _is_alive(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        # Nobody reads, or the pipe is gone. Anything else (no file descriptors left) proves nothing.
        return error.errno not in (errno.ENXIO, errno.ENOENT)
    return True


# --- the clock --------------------------------------------------------------------------------

# It counts while the machine sleeps, too.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def _steady() -> float:
    return time.clock_gettime(_STEADY)


def _clock_domain() -> str:
    """What the steady clock's numbers can be compared within."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/time")
    return f"{boot} {namespace}"


class _Clock:
    """The broker's time, in seconds: that of the wall's clock when the file was made, and a second a second since then.

    So nothing comes early, late or never when somebody (or NTP) sets the machine's clock. Only for the time in which
    the machine was off, the wall's clock has to be believed; and it never goes back.
    """

    def __init__(self) -> None:
        self._domain = _clock_domain()
        self._offset = 0.0
        self._ahead = 0.0  # of the wall's clock, by what the file says

    def read(self, store: Store) -> None:
        """In a transaction: find out, from what the file says, what time it is."""
        sql = store.sql
        sql(CLOCKS)
        row = sql(KNOWN_CLOCK, self._domain).fetchone()
        alone = not sql("SELECT 1 FROM clients LIMIT 1").fetchone()
        if row is not None and not (alone and self._domain == " "):  # unknown: it may be another boot
            then, wall, steady = row
            self._offset, self._ahead = then - steady, then - wall
            return
        now = time.time()
        newest = sql(NEWEST_CLOCK).fetchone()
        if newest is not None:
            then, wall = newest
            now = max(then, now + then - wall)
        self._offset = now - _steady()
        self.note(store)
        sql(FORGET_CLOCKS)

    def now(self) -> float:
        return _steady() + self._offset

    def note(self, store: Store) -> None:
        """In a transaction: keep what time it is, for those who come after the next boot."""
        now, wall, steady = self.now(), time.time(), _steady()
        self._ahead = now - wall
        store.sql(NOTE_CLOCK, self._domain, now, wall, steady)

    @property
    def wall_was_set(self) -> bool:
        """Whether somebody has set the wall's clock since that was noted."""
        return abs(self.now() - time.time() - self._ahead) > 1.0


# --- the file ---------------------------------------------------------------------------------

_create_lock = threading.Lock()


def _open_file(place: Place) -> sqlite3.Connection:
    """Open the file, making it where it is not there.

    Raises:
        BrokerFileError: it cannot be used; it is left as it was.
    """
    path = place.path
    try:
        _create_file(path)
        database = sqlite3.connect(
            f"file:{quote(os.fsencode(path))}?mode=rw",
            uri=True,
            timeout=LOCK_TIMEOUT,
            isolation_level=None,
            check_same_thread=False,
        )
    except (OSError, sqlite3.Error) as error:
        raise _cannot_open(path, error) from error
    try:
        _prepare(database, place)
    except BaseException as error:
        database.close()
        if isinstance(error, sqlite3.Error):
            raise explain(path, error) from error
        raise
    return database


def _create_file(path: Path) -> None:
    if path == platformdirs.user_state_path("lightbus") / "bus.db":
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.path.lexists(path):
        return
    # Created by us, since SQLite would follow the umask; only where it is missing, and under a lock,
    # since closing a file drops the locks that SQLite holds on it in this process.
    with _create_lock, _folder_locked(path.parent), contextlib.suppress(FileExistsError):
        if not os.path.lexists(path):
            for left_over in _companions(path):  # of a file that was deleted: SQLite would read them as the new one's
                left_over.unlink(missing_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


@contextlib.contextmanager
def _folder_locked(folder: Path) -> Generator[None]:
    """One process at a time creates a file there, or takes away what is left of one. (Not all file systems can.)"""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _companions(path: Path) -> tuple[Path, Path]:
    """SQLite's log and its index, which belong to the file."""
    return path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


_Identity = tuple[int, int]  # device and inode


def _identity(path: str) -> _Identity | None:
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_dev, found.st_ino


def _prepare(database: sqlite3.Connection, place: Place) -> None:
    if _is_empty(database, place.path):
        database.execute("PRAGMA auto_vacuum = INCREMENTAL")  # later only a VACUUM could change it
        _use_wal(database, place.path)
        _create_schema(database, place.path)
    database.execute("PRAGMA synchronous = OFF" if place.in_memory else "PRAGMA synchronous = NORMAL")
    database.execute("PRAGMA journal_size_limit = 67108864")
    database.execute("PRAGMA temp_store = MEMORY")


def _is_empty(database: sqlite3.Connection, path: Path) -> bool:
    database.execute("BEGIN")  # one view of the file, in which another process may be making the schema right now
    try:
        return _check_version(database, path)
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


def _check_version(database: sqlite3.Connection, path: Path) -> bool:
    """True where the file is empty. Reads only: another program's file stays as it is."""
    ours = database.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if ours and version == SCHEMA_VERSION:
        return False
    if ours:
        raise errors.BrokerFileError(
            f"The embedded broker's file {path} has schema version {version}, and this Lightbus reads version "
            f"{SCHEMA_VERSION}. Use the Lightbus that wrote it, or another file."
        )
    if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise errors.BrokerFileError(
            f"{path} is a database of another program, not the embedded broker's. "
            "Point the broker URL at a file of its own."
        )
    return True


def _use_wal(database: sqlite3.Connection, path: Path) -> None:
    mode = "?"
    deadline = time.monotonic() + LOCK_TIMEOUT
    while mode != "wal":
        try:
            mode = database.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            # SQLite does not wait here for another process that creates the file at the same time.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            if mode != "wal":
                raise errors.BrokerFileError(
                    f"The embedded broker cannot use its file {path} there: the file system does not support SQLite's "
                    "write-ahead log (a network drive?). Use a file on a local disk."
                )


def _create_schema(database: sqlite3.Connection, path: Path) -> None:
    database.execute("BEGIN IMMEDIATE")
    try:
        if _check_version(database, path):  # else another process was faster
            for statement in _statements(SCHEMA):
                database.execute(statement)
            database.executemany(
                "INSERT INTO exchanges VALUES (?, ?, 1, 0, 0, ?)",
                [(name, kind, _encode_arguments({})) for name, kind in PREDECLARED.items()],
            )
            database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        database.execute("COMMIT")
    except BaseException:
        database.execute("ROLLBACK")
        raise


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        yield statement


def _cannot_open(path: Path, error: Exception) -> Exception:
    if _descriptors_are_used_up(error):
        return _too_many_files(path)
    if not path.parent.is_dir():
        return errors.BrokerFileError(
            f"The embedded broker cannot open its file {path}: the folder {path.parent} does not exist. Create it."
        )
    return errors.BrokerFileError(
        f"The embedded broker cannot open its file {path}: {error}. Check the path and its permissions."
    )


def _descriptors_are_used_up(error: Exception) -> bool:
    """SQLite says only that it cannot open or read something: then it is tried here, which takes less than it does."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    if getattr(error, "sqlite_errorcode", 0) & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
        return False
    opened: list[int] = []
    try:
        for _ in range(4):  # the file, its log, its index, and a folder
            opened.append(os.open(os.devnull, os.O_RDONLY))
    except OSError as refused:
        return refused.errno in (errno.EMFILE, errno.ENFILE)
    finally:
        for descriptor in opened:
            os.close(descriptor)
    return False


def _too_many_files(path: Path) -> errors.LimitReached:
    return errors.LimitReached(
        f"The embedded broker cannot open its file {path}: this process (or the machine) has too many open files. "
        f"Find the leak (lsof -p {os.getpid()}), or raise the limit (ulimit -n)."
    )


_NEXT_STEPS = {
    sqlite3.SQLITE_FULL: "Free disk space; nothing of this operation was stored.",
    sqlite3.SQLITE_READONLY: "Check the permissions of the file and its folder.",
    sqlite3.SQLITE_CANTOPEN: "Check the permissions of the file and its folder.",
    sqlite3.SQLITE_PERM: "Check the permissions of the file and its folder.",
    sqlite3.SQLITE_CORRUPT: "It is damaged: restore it from a backup, or move it away to start with an empty one.",
    sqlite3.SQLITE_NOTADB: "It is not an SQLite file: point the broker URL at another path, or move it away.",
    sqlite3.SQLITE_IOERR: "Check the disk.",
}


def explain(path: Path, error: sqlite3.Error) -> Exception:
    """Lightbus' or AMQP's error for one of SQLite's."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return amqp_error(
            amqp_errors.RecoverableConnectionError,
            f"The embedded broker's file {path} was locked by another process for more than {LOCK_TIMEOUT:g} s. Find "
            "it with lsof, and stop it.",
        )
    if _descriptors_are_used_up(error):
        return _too_many_files(path)
    if code == sqlite3.SQLITE_TOOBIG:
        return amqp_error(amqp_errors.ContentTooLarge, f"CONTENT_TOO_LARGE - {error}")
    step = _NEXT_STEPS.get(code, "Check the file, its permissions and the disk.")
    return errors.BrokerFileError(f"The embedded broker cannot use its file {path}: {error}. {step}")


class File:
    """One client's handle on the file.

    SQLite keeps what it has locked in the memory of the process, where a forked child would find locks that
    nobody will ever give back, and would miss those that it needs. So no file is open while a process forks:
    the forking thread waits until the others have ended their transactions, and closes their files. The
    parent opens them again when they are next used.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.lock = threading.RLock()  # held while in use
        self.closed = False
        self._database: sqlite3.Connection | None = None
        self._synced = False
        self._names = [str(path) for path in (place.path, *_companions(place.path))]
        self._identities: list[_Identity | None] = []
        """Which files these were when they were opened."""
        with self.lock:
            with _files_lock:
                _files.add(self)
            self._open()

    def _open(self) -> sqlite3.Connection:
        if self.place.path in _unusable:
            raise errors.BrokerFileError(
                f"The embedded broker cannot use its file {self.place.path} in this process, which was forked in "
                "the middle of a transaction, or without Python's knowledge. Fork before connecting, or start a "
                "new process."
            )
        self._let_others_go()
        database = _open_file(self.place)
        found = [_identity(name) for name in self._names]
        if self._identities and self._identities[0] != found[0]:  # replaced while it was let go
            database.close()
            self.closed = True  # the ids that its client knows mean nothing in the new one
            raise self._moved()
        self._database, self._identities = database, found
        if self._synced and not self.place.in_memory:
            database.execute("PRAGMA synchronous = FULL")
        return database

    def _let_others_go(self) -> None:
        """
        Raises:
            amqp.exceptions.RecoverableConnectionError: SQLite's log and index were deleted, and another connection of
                this process still has them open. A process has one index for each file, so that a new log beside the
                old index would damage the file. The other connection finds out within a second.
        """
        if self.place.in_memory:
            return
        now = [_identity(name) for name in self._names]
        with _files_lock:
            others = [one for one in _files if one is not self and one.place.path == self.place.path]
        if any(one.has_open(now[0]) and one._identities != now for one in others):
            raise amqp_error(
                amqp_errors.RecoverableConnectionError,
                f"Another connection of this process still uses the deleted log of the embedded broker's file "
                f"{self.place.path}. Connecting again once it has noticed.",
            )

    def has_open(self, identity: _Identity | None) -> bool:
        """Whether it has a file open, and this one."""
        return self._database is not None and self._identities[:1] == [identity]

    def get(self) -> sqlite3.Connection:
        """The open file; the caller holds `lock`."""
        if self.closed:
            raise amqp_error(
                amqp_errors.RecoverableConnectionError,
                f"This connection to the embedded broker's file {self.place.path} is closed, or belongs to the "
                "process that this one was forked from. Open another.",
            )
        return self._database or self._open()

    def sync_on_commit(self) -> None:
        with self.lock:
            self._synced = True
            if not self.place.in_memory:
                self.get().execute("PRAGMA synchronous = FULL")

    def check_place(self) -> None:
        """Whether the open file is still the one of that name.

        SQLite does not ask: it goes on with a file that was deleted, which nobody else will ever see.

        Raises:
            amqp.exceptions.RecoverableConnectionError: it was deleted or replaced, or SQLite's files beside it were.
        """
        if self.place.in_memory:  # nobody else knows its name
            return
        with self.lock:
            if self._database is not None and self._identities != [_identity(name) for name in self._names]:
                raise self._moved()

    def _moved(self) -> Exception:
        opened, now = self._identities[0], _identity(self._names[0])
        path = self.place.path
        if now == opened:
            with contextlib.suppress(OSError, sqlite3.Error), _folder_locked(path.parent):
                # Where nobody has begun new ones, what is in them can be saved.
                if self._database is not None and not any(_identity(name) for name in self._names[1:]):
                    self._database.execute("PRAGMA wal_checkpoint(PASSIVE)")
            what = f"The files {path.name}-wal and -shm, which belong to the embedded broker's {path}, were deleted"
            step = (
                "Reconnecting; recently published events may be lost. Never delete these files while the broker "
                "is in use."
            )
        else:
            self._remove_companions()
            what = f"The embedded broker's file {path} was {'replaced by another' if now else 'deleted'}"
            step = "Reconnecting to the new file; events that waited in the old one are lost."
            if now:
                step += " Before you replace it, stop all programs that use it."
        return amqp_error(amqp_errors.RecoverableConnectionError, f"{what} while it was in use. {step}")

    def _remove_companions(self) -> None:
        """They belong to a file that is gone. With the one that has its name now, they would damage it."""
        with contextlib.suppress(OSError), _folder_locked(self.place.path.parent):
            for name, opened in list(zip(self._names, self._identities, strict=True))[1:]:
                if opened is not None and _identity(name) == opened:
                    os.unlink(name)

    def let_go(self) -> None:
        """Close for now."""
        if self._database is not None and not self._database.in_transaction:
            self._database.close()
            self._database = None

    def close(self) -> None:
        with self.lock:
            self.closed = True
            if self._database is not None:
                self._database.close()
                self._database = None

    def abandon(self) -> None:
        """In a forked child: the file is the parent's."""
        self.lock = threading.RLock()
        self.closed = True
        if self._database is not None:
            # SQLite forbids to use it here, or even to close it: it is never freed.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._database))
            self._database = None
            _unusable.add(self.place.path)


_files: weakref.WeakSet[File] = weakref.WeakSet()
_files_lock = threading.Lock()
_fork_lock = threading.Lock()
_let_go: list[File] = []  # while forking: those whose locks are held
_unusable: set[Path] = set()


def _before_fork() -> None:
    _fork_lock.acquire()
    while new := _other_files():
        for file in new:
            file.lock.acquire()
            _let_go.append(file)
    for file in _let_go:
        file.let_go()


def _other_files() -> list[File]:
    with _files_lock:
        return [file for file in _files if file not in _let_go]


def _after_fork_in_parent() -> None:
    while _let_go:
        _let_go.pop().lock.release()
    _fork_lock.release()


def _after_fork_in_child() -> None:
    global _create_lock, _files_lock, _fork_lock, _memory_lock
    _create_lock, _files_lock = threading.Lock(), threading.Lock()
    _fork_lock, _memory_lock = threading.Lock(), threading.Lock()
    _memory_folders.clear()  # the parent's: a child has a memory of its own
    _let_go.clear()
    for bell in list(_bells):
        bell.close_in_child()  # else this copy would keep the parent alive
    for file in list(_files):
        file.abandon()
    _files.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


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
    """One client's open file. One thread uses it; only `bell.ring` is for others."""

    def __init__(self, place: Place) -> None:
        self.path = place.path
        self._folder = place.path.with_name(place.path.name + ".clients")
        self._file = File(place)
        self._version = -1
        self._topology = Topology({}, {})
        self._clock = _Clock()
        self._advanced = 0.0  # seconds that tests have moved it
        self._last_entry = 0
        self._ring_for: set[int] = set()
        self._ring_all = False
        self._room: dict[int, int] = {}
        self._shrinks: bool | None = None
        self.client = -1
        try:
            self.bell = self._register()
            self.reap()
        except OSError as error:
            self._file.close()
            raise _cannot_open(self._folder, error) from error
        except BaseException:
            self._file.close()
            raise

    # --- life -----------------------------------------------------------------------------

    def _register(self) -> Bell:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        # The pipe is made while the transaction keeps others from judging who is alive.
        with self._raw_transaction():
            self._clock.read(self)
            self.client = self.sql("INSERT INTO clients DEFAULT VALUES").lastrowid or 0
            known = {self._bell_path(row[0]) for row in self.sql("SELECT id FROM clients")}
            for left_over in set(self._folder.glob("*.bell")) - known:
                left_over.unlink(missing_ok=True)
            path = self._bell_path(self.client)
            path.unlink(missing_ok=True)
            return Bell(path)

    def _bell_path(self, client: int) -> Path:
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
                    self._bury(self.client)
        finally:
            self.bell.remove()
            self.drop()

    def drop(self) -> None:
        """Close the file without a word; others find the client dead."""
        self.bell.close()
        self._file.close()

    def reap(self) -> None:
        """Find clients that died, and return what they held."""
        clients = [row[0] for row in self._read("SELECT id FROM clients")]
        dead = [client for client in clients if client != self.client and not _is_alive(self._bell_path(client))]
        if not dead:
            return
        with self.transaction():
            for client in dead:
                if self.sql("SELECT 1 FROM clients WHERE id = ?", client).fetchone():
                    self._bury(client)
        for client in dead:
            self._bell_path(client).unlink(missing_ok=True)

    def _bury(self, client: int) -> None:
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
                f"CONNECTION_FORCED - another process found this connection's pipe {self.bell.path} gone and took "
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
            self.bell.ring()
        else:
            _ring(self._bell_path(client))

    def now(self) -> float:
        return (_standing_clocks.get(self.path) or self._clock.now()) + self._advanced

    def _wall_clock(self) -> float:
        """For people."""
        return self.now() if self.path in _standing_clocks else time.time() + self._advanced

    def watch_clock(self) -> None:
        """Note it where somebody has set the machine's clock."""
        if self._clock.wall_was_set:
            with self.transaction():
                self._clock.note(self)

    def stop_clock(self) -> None:
        """From now on only `advance_clock` moves it. For a broker in memory: others would not know."""
        # A whole second, so that sums of whole seconds meet exactly.
        _standing_clocks[self.path] = float(math.floor(time.time()))

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
            raise _locked(name)
        return queue

    def declare_exchange(self, wanted: Exchange) -> None:
        current = self._topology.exchanges.get(wanted.name)
        if current is not None:
            _assert_same("exchange", wanted.name, _exchange_facts(current), _exchange_facts(wanted))
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
            _encode_arguments(wanted.arguments),
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
        row = (source, kind, destination, routing_key, _encode_arguments(arguments))
        if self.sql("INSERT OR IGNORE INTO bindings VALUES (?, ?, ?, ?, ?)", *row).rowcount:
            self._topology_changed()
            self._release_held()

    def unbind(self, kind: Kind, destination: str, source: str, routing_key: str, arguments: Arguments | None) -> None:
        row = (source, kind, destination, routing_key, _encode_arguments(arguments))
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
        _check_queue_arguments(name, arguments)
        wanted = Queue(0, name, durable, owner, auto_delete, dict(arguments))
        if name in self._topology.queues:
            current = self.queue(name)
            if exclusive and current.exclusive_to is None:
                raise _locked(name)
            _assert_same("queue", name, _queue_facts(current), _queue_facts(wanted))
            return name
        self.sql(
            "INSERT INTO queues (name, durable, exclusive_to, auto_delete, arguments) VALUES (?, ?, ?, ?, ?)",
            name,
            durable,
            owner,
            auto_delete,
            _encode_arguments(arguments),
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
            self._clock.note(self)  # however wrong the wall's clock is after a boot, it waits no longer than it had to
            next_due = self._next_due()
            # Whoever is waiting may have to wake sooner than it knows.
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
