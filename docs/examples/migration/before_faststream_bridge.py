"""In between: a FastStream service consumes events of the Lightbus app `shop`, and publishes as `billing`."""

from faststream import FastStream
from faststream.rabbit import ExchangeType, RabbitBroker, RabbitExchange, RabbitQueue

broker = RabbitBroker("amqp://guest:guest@localhost:5672/")
app = FastStream(broker)
shop = RabbitExchange("shop", type=ExchangeType.TOPIC)  # the exchange of the Lightbus app
billing = RabbitExchange("billing", type=ExchangeType.TOPIC)


@broker.subscriber(RabbitQueue("billing-orders", routing_key="order.placed"), shop)
async def charge(order: dict) -> None:
    event = {"order_id": order["order_id"]}
    await broker.publish(event, exchange=billing, routing_key="order.charged", persist=True)
