"""The Django app `lightbus`."""

from __future__ import annotations

from django.apps import AppConfig
from django.core.checks import register


class LightbusConfig(AppConfig):
    name = "lightbus.django"
    label = "lightbus"
    verbose_name = "Lightbus"

    def ready(self) -> None:
        from lightbus.django.checks import check_the_app

        register(check_the_app, "lightbus")
