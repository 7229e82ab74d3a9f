"""Before, in a Django project: the task starts after the commit. Needs celery and django."""

from django.db import transaction
from shop.models import Order
from shop.tasks import send_receipt


def place_order(order_id: int, email: str) -> None:
    with transaction.atomic():
        Order.objects.create(id=order_id, email=email)
        send_receipt.delay_on_commit(order_id, email)
