"""The HTTP API of the shop. It publishes an event when the transaction has been committed."""

import json
from uuid import UUID

from django.db import transaction
from django.http import HttpRequest, JsonResponse

from lightbus.errors import PublishError
from orders.bus import OrderPlaced, OrderSeen, bus
from orders.models import Order


def place_order(request: HttpRequest, order_id: UUID) -> JsonResponse:  # the client may repeat a request
    email = json.loads(request.body)["email"]
    try:
        with transaction.atomic():
            Order.objects.update_or_create(id=order_id, defaults={"email": email})
            transaction.on_commit(lambda: bus.publish_sync(OrderPlaced(order_id=order_id, email=email)))
    except PublishError:
        # The order is stored, but its event may not be. The client repeats the request with the same order_id.
        return JsonResponse({"error": "Try again."}, status=503, headers={"Retry-After": "5"})
    return JsonResponse({"order": order_id}, status=202)


async def see_order(request: HttpRequest, order_id: UUID) -> JsonResponse:
    await bus.publish(OrderSeen(order_id=order_id))  # publish_sync would block the event loop here, so it raises
    return JsonResponse({"order": order_id}, status=202)
