"""Read by type checkers, never run: the values that users meet."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, assert_type

from lightbus import Lightbus, Message, Receipt, Reject, Retry, errors


def read(message: Message) -> None:
    assert_type(message.id, str)
    assert_type(message.event, str)
    assert_type(message.source, str)
    assert_type(message.time, datetime)
    assert_type(message.version, int)
    assert_type(message.attempt, int)
    assert_type(message.correlation_id, str)
    assert_type(message.causation_id, str | None)
    assert_type(message.headers, Mapping[str, Any])
    assert_type(message.body, bytes)
    assert_type(message.redelivered, bool)
    message.attempt = 2  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    message.headers["a"] = 1  # type: ignore[index]  # pyright: ignore[reportIndexIssue]


def catch() -> None:
    try:
        raise Reject("no such user")
    except errors.PublishManyError as error:
        for outcome in error.outcomes:
            assert_type(outcome, Any)  # a Receipt or a PublishError: errors stand below messages in the house
            if isinstance(outcome, Receipt):
                assert_type(outcome.routed, bool)
    except errors.PublishTimeout as error:
        timed_out: TimeoutError = error
        print(timed_out)
    except errors.LightbusError:
        pass


def policies() -> None:
    retry = Retry(delays=[1, 2.5], on=ConnectionError, jitter=0.2)
    assert_type(retry.delays, tuple[float, ...])
    assert_type(retry.on, tuple[type[BaseException], ...])
    assert_type(Retry.none(), Retry)


@asynccontextmanager
async def lifespan(app: Lightbus) -> AsyncGenerator[None]:
    print(app.name)
    yield


app = Lightbus("billing", url=["amqp://a/", "amqp://b/"], lifespan=lifespan)
assert_type(app.name, str)
