import os
from pathlib import Path

LIGHTBUS_APP = "orders.bus:bus"
LIGHTBUS_URL = os.environ.get("LIGHTBUS_URL", "sqlite://")  # in production: amqp://user:password@host:5672/vhost

SECRET_KEY = os.environ.get("SECRET_KEY", "for local use only")
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
INSTALLED_APPS = ["lightbus.django", "orders"]
ROOT_URLCONF = "shop.urls"
USE_TZ = True
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DATABASE", str(Path(__file__).parent.parent / "db.sqlite3")),
        "OPTIONS": {"timeout": 10, "transaction_mode": "IMMEDIATE"},  # views and the worker write to one file
    }
}
