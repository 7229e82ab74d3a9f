"""Before: the shop imports this module and calls `place_order`, which starts a Celery task. Needs celery."""

import smtplib

from celery import Celery

app = Celery("shop", broker="amqp://guest:guest@localhost:5672//")


def place_order(order_id: int, email: str) -> None:
    send_receipt.delay(order_id, email)


@app.task(autoretry_for=(OSError,), max_retries=3, retry_backoff=True, acks_late=True)
def send_receipt(order_id: int, email: str) -> None:
    with smtplib.SMTP("localhost", 25) as server:
        server.sendmail("shop@example.com", email, f"Subject: Order {order_id}\n\nThank you.")
