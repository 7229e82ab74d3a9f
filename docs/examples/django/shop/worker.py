"""The module that a worker imports: it sets up Django, then imports the handlers."""

import os

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
django.setup()

from orders.handlers import bus  # noqa: E402 - models can only be imported now

__all__ = ["bus"]
