"""The statements that create the tables, for each database."""

from __future__ import annotations

import pytest

from lightbus import errors
from lightbus.outbox.tables import DIALECTS, ddl


@pytest.mark.parametrize("dialect", DIALECTS)
def test_each_database_has_its_statements(dialect: str) -> None:
    statements = ddl(dialect)
    for table in ("lightbus_outbox", "lightbus_inbox"):
        assert f"CREATE TABLE {table} (" in statements
    assert ("AUTO_INCREMENT" in statements) == (dialect in ("mysql", "mariadb"))
    assert statements.count("ENGINE=InnoDB CHARSET=utf8mb4 COLLATE utf8mb4_bin") == (
        2 if dialect in ("mysql", "mariadb") else 0
    )
    assert ("pg_notify" in statements) == (dialect == "postgresql")


def test_another_database_is_refused() -> None:
    with pytest.raises(errors.InvalidOption, match="dialect='oracle': use one of postgresql, sqlite, mysql, mariadb"):
        ddl("oracle")
