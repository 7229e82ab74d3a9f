"""The short scenarios of `make faults`: every confirmed event is handled, dead-lettered or still queued."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import need_artemis, need_rabbitmq
from tests.faults.plan import PLAN, Planned
from tests.faults.stage import CannotRun, Stage

SHORT = [planned for planned in PLAN if planned.short is not None and not planned.postgres]


def _marks(planned: Planned) -> list[pytest.MarkDecorator]:
    if planned.rabbitmq:
        return [pytest.mark.rabbitmq]
    return [pytest.mark.artemis] if planned.artemis else []


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with Stage() as stage:
        yield stage


@pytest.mark.parametrize(
    "planned",
    [pytest.param(one, id=one.name, marks=_marks(one)) for one in SHORT],
)
def test_no_confirmed_event_is_lost(planned: Planned, stage: Stage) -> None:
    if planned.rabbitmq:
        need_rabbitmq()
    if planned.artemis:
        need_artemis()
    assert planned.short is not None
    try:
        row = planned.short(stage)
    except CannotRun as why:
        pytest.skip(str(why))
    print(row)
    row.check()
