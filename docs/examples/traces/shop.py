"""Takes orders over HTTP. Try it: opentelemetry-instrument uvicorn shop:api"""

from fastapi import FastAPI

from lightbus import Lightbus

app = Lightbus("shop")


@app.event
class OrderPlaced:
    order_id: int
    email: str


api = FastAPI()


@api.put("/orders/{order_id}", status_code=202)
async def place(order_id: int, email: str) -> dict[str, str]:
    receipt = await app.publish(OrderPlaced(order_id=order_id, email=email))
    return {"event": receipt.id}
