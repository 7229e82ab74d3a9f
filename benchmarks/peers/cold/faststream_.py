"""faststream run benchmarks.peers.cold.faststream_:app"""

from faststream import FastStream
from faststream.rabbit import QueueType, RabbitBroker, RabbitQueue
from pydantic import BaseModel

from .report import NAME, URL, handled

broker = RabbitBroker(URL)
app = FastStream(broker)


class Order(BaseModel):
    order_id: str
    customer_id: int
    email: str
    total: float
    currency: str
    items: list[str]
    paid: bool


@broker.subscriber(RabbitQueue(NAME, queue_type=QueueType.QUORUM, durable=True))
async def handle(order: Order) -> None:
    handled(order.customer_id)
