"""`manage.py lightbus_worker`: `lightbus worker` with Django's settings."""

from __future__ import annotations

from lightbus.django.command import Forward


class Command(Forward):
    help = "Handle the app's events until stopped: `lightbus worker` with Django's settings."
    subcommand = "worker"
