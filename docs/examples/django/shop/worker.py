"""What a worker loads: Django first, then the handlers. `lightbus worker shop.worker:bus` works as well."""

import os

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")
django.setup()

from orders.handlers import bus  # noqa: E402 - models can only be imported now

__all__ = ["bus"]
