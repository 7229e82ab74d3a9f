"""The objects of a kind that are in use."""

from __future__ import annotations

import gc

from lightbus.living import Living


class Thing:
    pass


def test_objects_may_be_added_during_an_iteration() -> None:
    living: Living[Thing] = Living()
    first, later = Thing(), Thing()
    living.add(first)
    found = []
    for one in living:
        living.add(later)
        found.append(one)
    assert found == [first]
    assert [*living] == [first, later]


def test_no_object_is_kept_alive_and_the_end_of_one_does_not_disturb_an_iteration() -> None:
    living: Living[Thing] = Living()
    things = [Thing() for _ in range(3)]
    for one in things:
        living.add(one)
    iteration = iter(living)
    kept = next(iteration)
    del things, one
    gc.collect()
    assert [*iteration] == []
    assert [*living] == [kept]
