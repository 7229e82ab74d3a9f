"""The short scenarios of `make faults`: every confirmed event is handled, dead-lettered or still queued."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import need_rabbitmq
from tests.faults.plan import PLAN, Planned
from tests.faults.scenarios import CannotRun
from tests.faults.stage import Stage

SHORT = [planned for planned in PLAN if planned.short is not None and not planned.postgres]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


@pytest.mark.parametrize(
    "planned",
    [pytest.param(one, id=one.name, marks=[pytest.mark.rabbitmq] if one.rabbitmq else []) for one in SHORT],
)
def test_no_confirmed_event_is_lost(planned: Planned, stage: Stage) -> None:
    if planned.rabbitmq:
        need_rabbitmq()
    assert planned.short is not None
    try:
        row = planned.short(stage)
    except CannotRun as why:
        pytest.skip(str(why))
    print(row)
    row.check()
