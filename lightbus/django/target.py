"""The app of a Django project: the setting LIGHTBUS_APP, or the environment variable of the same name."""

from __future__ import annotations

import os

import django
from django.apps import apps
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.cli import target as targets

VARIABLE = "LIGHTBUS_APP"
TARGET = "lightbus.django:app"
"""The same app for `lightbus` commands, which then set up Django."""


def name_of_app() -> str | None:
    """`shop.bus:app`; None if it is not set."""
    name = os.environ.get(VARIABLE) or getattr(settings, VARIABLE, None)
    return name or None


def set_up() -> Lightbus:
    """Set up Django, unless it is, and import the app.

    Raises:
        errors.TargetError: there is no such app, or it cannot be imported; or Django has no settings.
    """
    try:
        if not apps.ready:
            django.setup()
        name = name_of_app()
    except ImproperlyConfigured as error:
        raise errors.TargetError(
            f"{TARGET} needs Django's settings: set DJANGO_SETTINGS_MODULE=shop.settings. Django says: {error}"
        ) from error
    if name is None:
        raise errors.TargetError(
            f'{TARGET} is the app that the setting {VARIABLE} names, as in "shop.bus:app". Set it.'
        )
    if name == TARGET:
        raise errors.TargetError(f"{VARIABLE}={name!r} names itself. Name the module of your app, as in shop.bus:app.")
    return targets.find_app(name)
