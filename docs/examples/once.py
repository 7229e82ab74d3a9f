"""An idempotent handler: it stores the event's id in the same transaction as its work."""

import contextlib
import os
import sqlite3

import attrs

from lightbus import Lightbus, Message

DATABASE = os.environ.get("LOYALTY_DATABASE", "loyalty.db")
app = Lightbus("loyalty")


@attrs.frozen
class Order:
    customer: str
    amount: int


@app.on("order.placed")
def add_points(order: Order, message: Message) -> None:
    with contextlib.closing(sqlite3.connect(DATABASE)) as database, database:  # one transaction
        database.execute("CREATE TABLE IF NOT EXISTS handled (id TEXT PRIMARY KEY)")
        database.execute("CREATE TABLE IF NOT EXISTS points (customer TEXT PRIMARY KEY, sum INTEGER)")
        if not database.execute("INSERT OR IGNORE INTO handled VALUES (?)", [message.id]).rowcount:
            return  # a duplicate: nothing to do
        database.execute(
            "INSERT INTO points VALUES (?, ?) ON CONFLICT (customer) DO UPDATE SET sum = sum + excluded.sum",
            [order.customer, order.amount],
        )
