"""Text on stderr, JSON in a file. Try it: lightbus worker own_config:app --no-configure-logging"""

import logging.config

from charging import app as app

logging.config.dictConfig(
    {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "text": {"format": "%(levelname)s %(name)s: %(message)s"},
            "json": {"()": "lightbus.logs.JSONLines"},
        },
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "formatter": "text"},
            "file": {
                "class": "logging.handlers.RotatingFileHandler",
                "filename": "billing.log",
                "maxBytes": 10_000_000,
                "backupCount": 5,
                "formatter": "json",
            },
        },
        "root": {"level": "INFO", "handlers": ["stderr", "file"]},
        "loggers": {"amqp": {"level": "WARNING"}},
    }
)
