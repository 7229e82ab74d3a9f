"""Ids, `Message` and `Receipt`."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import attrs
import pytest

from lightbus import Receipt
from lightbus.message import new_id


def test_an_id_is_a_uuid_of_version_7_with_the_time_in_front() -> None:
    before = time.time_ns() // 1_000_000
    made = uuid.UUID(new_id())
    after = time.time_ns() // 1_000_000
    assert (made.version, made.variant) == (7, uuid.RFC_4122)
    assert before - 1 <= made.int >> 80 <= after + 1


def test_an_id_is_written_in_the_usual_36_characters() -> None:
    made = new_id()
    assert made == str(uuid.UUID(made))


def test_ids_sort_by_the_millisecond_in_which_they_were_made() -> None:
    made = []
    for _ in range(20):
        made.append(new_id())
        time.sleep(0.003)
    assert made == sorted(made)


def test_ids_are_unique_across_threads() -> None:
    with ThreadPoolExecutor(8) as threads:
        made = [one for ids in threads.map(lambda _: [new_id() for _ in range(5000)], range(8)) for one in ids]
    assert len(set(made)) == len(made) == 40_000


def test_the_random_bits_differ_within_one_millisecond() -> None:
    randoms = {uuid.UUID(new_id()).int & (1 << 62) - 1 for _ in range(1000)}
    assert len(randoms) == 1000


def test_a_receipt_is_a_value() -> None:
    receipt = Receipt("i", routed=True)
    assert receipt == Receipt("i", routed=True)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        receipt.routed = False  # type: ignore[misc]
