"""The HTTP API of the shop: it publishes an event for each order. Try it: flask --app shop run"""

from uuid import UUID

from flask import Flask, request

from lightbus.errors import PublishError
from shop.bus import OrderPlaced, bus


def create_app() -> Flask:
    app = Flask(__name__)
    app.add_url_rule("/orders/<uuid:order_id>", view_func=place_order, methods=["PUT"])
    app.register_error_handler(PublishError, not_published)
    return app


def place_order(order_id: UUID) -> tuple[dict[str, str], int]:  # the client chooses the id: it may repeat a request
    receipt = bus.publish_sync(OrderPlaced(order_id=order_id, email=request.get_json()["email"]))
    return {"event": receipt.id}, 202


def not_published(error: Exception) -> tuple[dict[str, str], int, dict[str, str]]:
    # A publish that timed out may have arrived. The client repeats the request with the same order_id.
    return {"error": "The order could not be taken. Try again."}, 503, {"Retry-After": "5"}
