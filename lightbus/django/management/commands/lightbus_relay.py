"""`manage.py lightbus_relay`: `lightbus relay` with Django's settings."""

from __future__ import annotations

from lightbus.django.command import Forward


class Command(Forward):
    help = "Send the events of the app's outbox until stopped: `lightbus relay` with Django's settings."
    subcommand = "relay"
