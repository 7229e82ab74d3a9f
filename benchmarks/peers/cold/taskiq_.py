"""taskiq worker benchmarks.peers.cold.taskiq_:broker"""

from aio_pika import ExchangeType
from pydantic import BaseModel
from taskiq_aio_pika import AioPikaBroker
from taskiq_aio_pika.exchange import Exchange
from taskiq_aio_pika.queue import Queue

from .report import NAME, URL, handled

broker = AioPikaBroker(
    URL,
    exchange=Exchange(name=f"{NAME}.tasks", type=ExchangeType.TOPIC),
    task_queues=[Queue(name=NAME)],
    dead_letter_queue=Queue(name=f"{NAME}.dead"),
)


class Order(BaseModel):
    order_id: str
    customer_id: int
    email: str
    total: float
    currency: str
    items: list[str]
    paid: bool


@broker.task("order.placed")
async def handle(event: Order) -> None:
    handled(event.customer_id)
