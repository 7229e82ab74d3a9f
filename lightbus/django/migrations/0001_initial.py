"""Creates both tables.

On PostgreSQL, it also creates the trigger that wakes relays when a transaction with events commits. On MariaDB and
MySQL, it sets the character set and collation, which may not distinguish ids by default: see `lightbus.outbox.tables`.
"""

# pyright: reportArgumentType=false
# (Django has no types: that of db_default is taken for the one of its default.)

from __future__ import annotations

from typing import Any

from django.db import migrations, models

CREATE_TRIGGER = (
    "CREATE OR REPLACE FUNCTION lightbus_outbox_notify() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN PERFORM pg_notify('lightbus_outbox', ''); RETURN NULL; END $$",
    "CREATE OR REPLACE TRIGGER lightbus_outbox_notify AFTER INSERT ON lightbus_outbox "
    "FOR EACH STATEMENT EXECUTE FUNCTION lightbus_outbox_notify()",
)
DROP_TRIGGER = (
    "DROP TRIGGER IF EXISTS lightbus_outbox_notify ON lightbus_outbox",
    "DROP FUNCTION IF EXISTS lightbus_outbox_notify()",
)


DISTINGUISH_IDS = tuple(
    f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
    for table in ("lightbus_outbox", "lightbus_inbox")
)


class OnPostgreSQL(migrations.RunSQL):
    vendor = "postgresql"

    def database_forwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        if schema_editor.connection.vendor == self.vendor:
            super().database_forwards(app_label, schema_editor, from_state, to_state)

    def database_backwards(self, app_label: str, schema_editor: Any, from_state: Any, to_state: Any) -> None:
        if schema_editor.connection.vendor == self.vendor:
            super().database_backwards(app_label, schema_editor, from_state, to_state)


class OnMySQL(OnPostgreSQL):
    """MariaDB too."""

    vendor = "mysql"


class Migration(migrations.Migration):
    initial = True
    dependencies = ()
    operations = (
        migrations.CreateModel(
            name="OutboxRow",
            fields=[
                ("id", models.BigAutoField(primary_key=True, serialize=False)),
                ("app", models.CharField(max_length=255)),
                ("event", models.CharField(max_length=255)),
                ("message_id", models.CharField(max_length=255)),
                ("body", models.BinaryField()),
                ("properties", models.BinaryField()),
                ("delay", models.IntegerField(db_default=0)),
                ("added_at", models.FloatField()),
                ("state", models.SmallIntegerField(db_default=0)),
                ("due", models.FloatField(db_default=0.0)),
                ("attempts", models.IntegerField(db_default=0)),
                ("error", models.TextField(null=True)),
            ],
            options={
                "db_table": "lightbus_outbox",
                "indexes": [models.Index(fields=["app", "state", "due", "id"], name="lightbus_outbox_due")],
            },
        ),
        migrations.CreateModel(
            name="InboxRow",
            fields=[
                (
                    "pk",
                    models.CompositePrimaryKey(
                        "handler", "message_id", blank=True, editable=False, primary_key=True, serialize=False
                    ),
                ),
                ("handler", models.CharField(max_length=511)),
                ("message_id", models.CharField(max_length=255)),
                ("handled_at", models.FloatField()),
            ],
            options={
                "db_table": "lightbus_inbox",
                "indexes": [models.Index(fields=["handled_at"], name="lightbus_inbox_handled_at")],
            },
        ),
        OnPostgreSQL(CREATE_TRIGGER, DROP_TRIGGER),
        OnMySQL(DISTINGUISH_IDS, migrations.RunSQL.noop),
    )
