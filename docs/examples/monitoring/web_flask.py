"""The same with Flask. Try it: gunicorn --config gunicorn.conf.py web_flask:app, then open /metrics."""

import os

from flask import Flask
from prometheus_client import REGISTRY, CollectorRegistry, make_wsgi_app
from prometheus_client.multiprocess import MultiProcessCollector
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from lightbus import Lightbus
from lightbus.telemetry.prometheus import Metrics

bus = Lightbus("shop")
Metrics(bus)


@bus.event
class OrderPlaced:
    order_id: int


app = Flask(__name__)
registry = REGISTRY
if "PROMETHEUS_MULTIPROC_DIR" in os.environ:  # several processes: see gunicorn.conf.py
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/metrics": make_wsgi_app(registry)})


@app.put("/orders/<int:order_id>")
def place(order_id: int) -> tuple[dict[str, str], int]:
    receipt = bus.publish_sync(OrderPlaced(order_id=order_id))
    return {"event": receipt.id}, 202
