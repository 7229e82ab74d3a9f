"""What a test of an application's own holds in its hands."""

from collections.abc import Callable
from typing import Any, assert_type

import attrs

from lightbus import Lightbus, Message, Receipt
from lightbus.testing import Dead, Failed, Handled, Published, TestBus

app = Lightbus("billing")


@app.event
@attrs.frozen
class InvoicePaid:
    invoice_id: str


@app.on(InvoicePaid)
async def thank(paid: InvoicePaid) -> None: ...


async def in_an_event_loop() -> None:
    async with TestBus(app, timeout=5, lifespan=False) as bus:
        assert_type(bus, TestBus)
        assert_type(await bus.publish("user.registered", {"user_id": 1}, source="auth"), Receipt)
        assert_type(await bus.drain(), None)
        assert_type(await bus.advance(3600), None)
        assert_type(bus.published(InvoicePaid), list[InvoicePaid])
        assert_type(bus.published("invoice.paid"), list[Any])
        assert_type(bus.published(), list[Published])
        assert_type(bus.handled(thank), list[Handled])
        assert_type(bus.handled(InvoicePaid)[0].message, Message)
        assert_type(bus.failed("thank"), list[Failed])
        assert_type(bus.failed()[0].exception, BaseException)
        assert_type(bus.dead(), list[Dead])
        assert_type(bus.dead()[0].handler, str | None)


def without_one(lightbus_bus: TestBus) -> None:
    with TestBus(app, backend="trio") as bus:
        assert_type(bus, TestBus)
        assert_type(bus.publish_sync("user.registered", b"{}"), Receipt)
        assert_type(bus.drain_sync(timeout=1), None)
    wrong: Callable[[], object] = lambda: TestBus("billing:app")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # noqa: E731
    print(wrong)
