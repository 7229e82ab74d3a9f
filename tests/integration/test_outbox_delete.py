"""The relay's DELETE on PostgreSQL: one parameter, however many rows were sent."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from lightbus.outbox import metadata, statements
from lightbus.outbox.tables import outbox


def test_the_sent_rows_are_deleted_with_one_parameter_and_no_other(postgres_url: str) -> None:
    engine = sa.create_engine(postgres_url)
    metadata.create_all(engine)
    row = {"app": "a", "event": "e", "message_id": "m", "body": b"", "properties": b"", "added_at": 0.0}
    deletes: list[Any] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def executing(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        if statement.startswith("DELETE"):
            deletes.append(parameters)

    with engine.begin() as connection:
        connection.execute(sa.insert(outbox), [row] * 501)
        claimed = [one.id for one in statements.claim(connection, "a", 500, 0)]
        statements.settle(connection, claimed, tuple(claimed[1:]), {})
        left = connection.execute(sa.select(outbox.c.id).order_by(outbox.c.id)).scalars().all()
    engine.dispose()
    assert len(claimed) == 500
    assert left == [claimed[0], claimed[-1] + 1]
    assert [len(parameters) for parameters in deletes] == [1]
