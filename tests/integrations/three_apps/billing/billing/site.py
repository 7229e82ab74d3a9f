"""Settings of Django."""

import os

SECRET_KEY = "for this test only"
USE_TZ = True
INSTALLED_APPS = ["lightbus.django", "invoices"]
LIGHTBUS_APP = "billing.bus:app"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "HOST": "127.0.0.1",
        "PORT": os.environ["DATABASE_PORT"],
        "NAME": os.environ["DATABASE_NAME"],
        "USER": "postgres",
    }
}
