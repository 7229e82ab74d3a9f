"""The tables of the embedded broker's file, its SQL, and its limits."""

from __future__ import annotations

APPLICATION_ID = 0x4C627573  # "Lbus": marks a file of the embedded broker
SCHEMA_VERSION = 1
LOCK_TIMEOUT = 10.0  # seconds to wait for another client's transaction
CLOSE_TIMEOUT = 3.0  # the same while closing: other clients requeue this client's messages if it fails
RETRY_HELD = (1.0, 60.0)  # seconds until a held message is tried again: the shortest and the longest
MAX_BODY = 128 * 1024 * 1024  # bytes: RabbitMQ's own default until 3.13
CLAIM_MESSAGES = 100  # per claim, so that competing consumers get their share
CLAIM_BYTES = 16 * 1024 * 1024
SPARE_PAGES = 1024  # free pages that the file may always have: 4 MB
GIVE_BACK = 1000  # pages per transaction: 4 MB. Other clients wait about 30 ms for it
EXPIRE_BATCH = 500  # messages per transaction, so that other clients get their turn
STREAM_LENGTH = 10_000
"""Messages that a stream keeps."""
CACHED_ROUTES = 20_000
INCREMENTAL = 2  # a value of auto_vacuum
HELD = 0  # the owner of a held message: it is neither ready nor with a client

# An entry is a message in one queue. Its content is in another table, so that claiming a large message does not rewrite
# it. `owner` is NULL while the message is ready. `due` is when it expires, or when a held message is tried again.
SCHEMA = """
CREATE TABLE broker (
    topology INTEGER NOT NULL,     -- counts changes, so that clients know when to read it again
    clock REAL NOT NULL,           -- seconds that tests have moved the clock
    last_entry INTEGER NOT NULL    -- ids are never reused: a late ack cannot settle a new message
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
    held_for TEXT,                 -- the reason for dead-lettering, of a held message
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
# Delays follow the machine's steady clock (`Clock`), which cannot be set. It starts again with each boot. So each row
# has the times of the broker's clock, the wall clock and the steady clock at one moment. The last row is the newest.
# This table is not part of the schema version: versions without it follow the wall clock.
CLOCKS = """
CREATE TABLE IF NOT EXISTS clocks (
    domain TEXT PRIMARY KEY,       -- the boot and the container of the steady clock
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
FIRST_PROPERTIES = """
    SELECT c.properties FROM entries e JOIN contents c ON c.id = e.id
    WHERE e.queue = ? AND e.owner IS NULL ORDER BY e.id LIMIT 1
"""
ALL_READY = """
    SELECT c.exchange, c.routing_key, c.properties, c.body FROM entries e JOIN contents c ON c.id = e.id
    WHERE e.queue = ? AND e.owner IS NULL ORDER BY e.id
"""
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
# Each attempt waits as long as the message has been held so far: short at first, and little work for many messages.
HOLD = """
    UPDATE entries SET owner = :held, held_for = :reason, held_since = coalesce(held_since, :now),
        due = :now + min(max(:now - coalesce(held_since, :now), :shortest), :longest)
    WHERE id = :id
"""
REQUEUE = "UPDATE entries SET owner = NULL, due = expires, returns = returns + 1 WHERE id = ?"
