"""After, the mail service: it handles the event. Try it: lightbus worker after_celery_mail:app"""

import smtplib

import attrs

from lightbus import Lightbus, Retry

app = Lightbus("mail")


@attrs.frozen
class Order:
    order_id: int
    email: str


@app.on("order.placed", retry=Retry(delays=(1, 2, 4), on=OSError))
def send_receipt(order: Order) -> None:
    with smtplib.SMTP("localhost", 25) as server:
        server.sendmail("shop@example.com", order.email, f"Subject: Order {order.order_id}\n\nThank you.")
