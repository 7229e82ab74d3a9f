"""Publishes an event for each order. Try it: python shop.py margherita marinara"""

import sys

import attrs

from lightbus import Lightbus

app = Lightbus("shop")


@app.event  # published as "order.placed"
@attrs.frozen
class OrderPlaced:
    number: int
    dish: str


if __name__ == "__main__":
    with app:
        for number, dish in enumerate(sys.argv[1:], start=1):
            receipt = app.publish_sync(OrderPlaced(number=number, dish=dish))
            print(f"order {number}, {dish}: confirmed, {'routed' if receipt.routed else 'not routed'}")
