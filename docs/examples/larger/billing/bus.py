"""The app. Start the worker: lightbus worker billing.bus:app"""

from lightbus import Lightbus

app = Lightbus(
    "billing",
    include=[  # imported by workers, commands and tests; not by a program that only publishes
        "billing.handlers.orders",
        "billing.handlers.payments",
    ],
)
