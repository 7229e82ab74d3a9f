"""The short scenarios of outbox and inbox: each committed order has one invoice, each rolled-back one none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import need_postgres, need_rabbitmq
from tests.faults.plan import PLAN, Planned
from tests.faults.stage import Stage

pytestmark = [pytest.mark.rabbitmq, pytest.mark.postgres]

SHORT = [planned for planned in PLAN if planned.short is not None and planned.postgres]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    need_rabbitmq()
    need_postgres()
    with Stage() as stage:
        yield stage


@pytest.mark.parametrize("planned", [pytest.param(one, id=one.name) for one in SHORT])
def test_each_order_has_one_invoice(planned: Planned, stage: Stage) -> None:
    assert planned.short is not None
    row = planned.short(stage)
    print(row)
    row.check()
