"""An app that is garbage-collected without being closed leaves no thread and no file descriptor."""

from __future__ import annotations

import gc
import os
import threading

import pytest

from lightbus import Lightbus
from tests.bus import OrderPlaced, eventually
from tests.patience import wait_until

pytestmark = pytest.mark.anyio

APPS = 60


def _used(broker_url: str) -> Lightbus:
    app = Lightbus("dropped", url=broker_url)
    app.event(OrderPlaced)
    return app


def _left() -> tuple[int, int]:
    gc.collect()
    publishers = [thread for thread in threading.enumerate() if thread.name == "lightbus dropped publisher"]
    return len(publishers), len(os.listdir("/dev/fd"))


def _within(threads: int, descriptors: int) -> bool:
    left = _left()
    return left[0] <= threads and left[1] <= descriptors


def test_apps_that_are_dropped_in_a_thread_leave_nothing(broker_url: str) -> None:
    _used(broker_url).publish_sync(OrderPlaced(number=0))  # a broker in memory keeps one descriptor, whatever uses it
    wait_until(lambda: _left()[0] == 0, "no thread is left")
    threads, descriptors = _left()
    for number in range(1, APPS + 1):
        _used(broker_url).publish_sync(OrderPlaced(number=number))
        if number % 20 == 0:
            wait_until(lambda: _within(threads, descriptors), "no thread and no descriptor is left")


async def test_apps_that_are_dropped_in_a_coroutine_leave_nothing(broker_url: str) -> None:
    await _used(broker_url).publish(OrderPlaced(number=0))  # the loop's own descriptors
    await eventually(lambda: _left()[0], 0)
    threads, descriptors = _left()
    for number in range(1, APPS + 1):
        await _used(broker_url).publish(OrderPlaced(number=number))
        if number % 20 == 0:
            await eventually(lambda: _within(threads, descriptors), True)
