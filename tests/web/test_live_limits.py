"""The stream of live events is bounded: in pages, in events, and in time."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from typing import Any

import pytest

from lightbus import Lightbus
from tests.bus import OrderPlaced
from tests.patience import LIMIT, wait_until
from tests.web.conftest import serving

STREAMS = 8


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('bus')}/bus.db"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, url: str) -> Iterator[str]:
    with serving(folder=tmp_path_factory.mktemp("web"), url=url) as one:
        yield one


class Stream:
    """A page that shows live events."""

    def __init__(self, address: str, query: str = "") -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", int(address.rpartition(":")[2]), timeout=LIMIT)
        self.connection.request("GET", f"/tail/events{query}")
        self.answer = self.connection.getresponse()

    def next(self) -> tuple[str, dict[str, Any]]:
        """The kind and the content of the next message."""
        kind = ""
        while True:
            line = self.answer.readline().decode()
            assert line, "the stream has ended"
            if line.startswith("event: "):
                kind = line[7:].strip()
            elif line.startswith("data: "):
                return kind, json.loads(line[6:])

    def close(self) -> None:
        self.connection.close()
        self.answer.close()


def is_open(one: Stream) -> bool:
    return one.answer.readline() == b"retry: 2000\n"


def open_stream(address: str, query: str) -> Stream:
    """One that shows live events, once the pages that were closed have made room."""
    opened: list[Stream] = []

    def opens() -> bool:
        opened.append(Stream(address, query))
        if is_open(opened[-1]):
            return True
        opened.pop().close()
        return False

    wait_until(opens, "room for a page")
    return opened[0]


def test_so_many_pages_show_live_events_and_a_closed_one_makes_room(address: str) -> None:
    several = [Stream(address) for _ in range(STREAMS)]
    assert all(map(is_open, several))
    refused = Stream(address)
    kind, content = refused.next()
    assert (kind, "8 pages already show live events" in content["text"]) == ("problem", True)
    several[0].close()

    def has_room() -> bool:
        with contextlib.closing(Stream(address)) as one:
            return is_open(one)

    wait_until(has_room, "room for another page")
    for one in (*several, refused):
        one.close()
    wait_until(has_room, "room after all are closed")


def test_an_invalid_filter_is_explained(address: str) -> None:
    with contextlib.closing(Stream(address, "?pattern=order..placed")) as one:
        kind, content = one.next()
        assert (kind, "'order..placed'" in content["text"]) == ("problem", True)


def test_of_a_flood_a_page_gets_a_part_and_is_told_so(address: str, url: str) -> None:
    shop = Lightbus("shop", url=url)
    shop.event("order.placed")(OrderPlaced)
    shown, skipped, overrun = 0, 0, False
    with contextlib.closing(open_stream(address, "?source=shop")) as one, shop:
        # Until its queue is bound, events are missed.
        wait_until(lambda: shop.publish_sync(OrderPlaced(number=0)).routed, "the page listens")
        for _ in range(6):
            shop.publish_many_sync([OrderPlaced(number=number, note="x" * 5000) for number in range(1, 501)])
        is_over = False
        while not is_over:
            shop.publish_sync(OrderPlaced(number=-1))
            kind, content = one.next()
            assert kind == "events"
            assert len(content["events"]) <= 50
            assert all(len(each["body"]) <= 2000 for each in content["events"])
            shown += len(content["events"])
            skipped += content["skipped"]
            overrun |= content["overrun"]
            is_over = any('"number": -1' in each["body"] for each in content["events"])
    assert 0 < shown < 3000
    assert skipped or overrun
