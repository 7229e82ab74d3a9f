"""celery -A benchmarks.peers.cold.celery_ worker"""

from typing import Any

from celery import Celery
from kombu import Queue

from .report import NAME, URL, handled

app = Celery("bench", broker=URL)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    task_default_queue=NAME,
    task_queues=[Queue(NAME, durable=True, queue_arguments={"x-queue-type": "quorum"})],
)


@app.task(name="order.placed")
def handle(order: dict[str, Any]) -> None:
    handled(order["customer_id"])
