"""Read by type checkers, never run: the types of `@app.event` and `@app.on`.

A line that must be an error has an ignore comment for each checker. An unnecessary ignore comment is an error, too.
"""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import assert_type

import attrs
import msgspec

from lightbus import Lightbus, Message, Receipt, Retry

app = Lightbus(
    "billing", retry=Retry(delays=(1, 5), on=(OSError, TimeoutError), never=ValueError), queue_type="classic"
)

# --- a plain class
# pyright supports `dataclass_transform` on a method. mypy does not, and finds no constructor:
# with mypy, stack `@app.event` over `@attrs.frozen`, as below.


@app.event
class InvoicePaid:
    invoice_id: str
    amount: int = 0


InvoicePaid(invoice_id="i-1")  # type: ignore[call-arg]
InvoicePaid(invoice_id="i-1", amount=5)  # type: ignore[call-arg]
InvoicePaid("i-1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
InvoicePaid()  # pyright: ignore[reportCallIssue]
InvoicePaid(invoice="i-1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
InvoicePaid(invoice_id=1)  # type: ignore[call-arg]  # pyright: ignore[reportArgumentType]


@app.event("invoice.sent", version=2)
class InvoiceSent:
    invoice_id: str


InvoiceSent(invoice_id="i-1")  # type: ignore[call-arg]
InvoiceSent(invoice=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def frozen(paid: InvoicePaid) -> None:
    paid.amount = 1  # pyright: ignore[reportAttributeAccessIssue]


# --- classes of other kinds are unchanged for both checkers


@app.event
@attrs.frozen(kw_only=True)
class UserMoved:
    user_id: int


assert_type(UserMoved(user_id=1).user_id, int)
UserMoved(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
UserMoved(user_id="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@app.event("user.left")
@attrs.frozen(kw_only=True)
class UserLeft:
    user_id: int


assert_type(UserLeft(user_id=1).user_id, int)
UserLeft(user_id="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@app.event
@dataclasses.dataclass(kw_only=True, frozen=True)
class UserBanned:
    user_id: int


assert_type(UserBanned(user_id=1).user_id, int)


@app.event
class UserNamed(msgspec.Struct, kw_only=True, frozen=True):
    user_id: int


assert_type(UserNamed(user_id=1).user_id, int)


app.event(5)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


# --- handlers keep their type


@app.on("user.registered", UserMoved, source="auth", retry=Retry.none(), timeout=5, concurrency=1, queue="slow")
async def open_account(user: UserMoved, message: Message) -> int:
    return user.user_id


@app.on("user.*")
def note(user: dict[str, object]) -> str:
    return str(user)


async def call_them(message: Message) -> None:
    assert_type(await open_account(UserMoved(user_id=1), message), int)
    assert_type(note({}), str)
    await open_account("x", message)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


app.on(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
app.on("user.*", timeout="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Lightbus("billing", "amqp://")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
Lightbus("billing", include=[1])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
assert_type(Lightbus("billing", include=["billing.handlers"]).include, tuple[str, ...])
Lightbus("billing", queue_type="stream")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Retry(delays=5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Retry(on="ValueError")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


# --- publishing


async def publish() -> None:
    async with app as opened:
        assert_type(opened, Lightbus)
        receipt = await app.publish(UserMoved(user_id=1), delay=5, headers={"tenant": "a"}, timeout=1.5)
        assert_type(receipt, Receipt)
        assert_type(receipt.routed, bool)
        assert_type(receipt.id, str)
        await app.publish(UserMoved(user_id=1), delay=timedelta(hours=1), timeout=timedelta(seconds=5))
        await app.publish(UserMoved(user_id=1), id="a", correlation_id="b", time=datetime.now(UTC))
        await app.publish(UserMoved(user_id=1), id=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        assert_type(await app.publish_many([UserMoved(user_id=1)], correlation_id="b"), list[Receipt])
        receipt.routed = False  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def publish_sync() -> None:
    with app as opened:
        assert_type(opened, Lightbus)
        assert_type(app.publish_sync(UserMoved(user_id=1)), Receipt)
        assert_type(app.publish_many_sync(iter([UserMoved(user_id=1)])), list[Receipt])
