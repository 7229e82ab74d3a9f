"""Before: a FastStream service that consumes orders and publishes charges. Needs faststream[rabbit]."""

from faststream import FastStream
from faststream.rabbit import ExchangeType, RabbitBroker, RabbitExchange, RabbitQueue
from pydantic import BaseModel

broker = RabbitBroker("amqp://guest:guest@localhost:5672/")
app = FastStream(broker)
shop = RabbitExchange("shop-events", type=ExchangeType.TOPIC)


class Order(BaseModel):
    order_id: int
    amount: int


class Charged(BaseModel):
    order_id: int


@broker.subscriber(RabbitQueue("billing-orders", routing_key="order.placed"), shop)
@broker.publisher(routing_key="order.charged", exchange=shop)
async def charge(order: Order) -> Charged:
    return Charged(order_id=order.order_id)
