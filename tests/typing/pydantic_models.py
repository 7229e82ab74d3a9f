"""Read by type checkers, never run: Pydantic models as events and as payloads, without a plug-in."""

from __future__ import annotations

from typing import Annotated, Literal, assert_type

from pydantic import BaseModel, Field
from pydantic.dataclasses import dataclass

from lightbus import Lightbus, Message, Receipt

app = Lightbus("billing")


@app.event
class UserMoved(BaseModel):
    user_id: int
    street: str = ""


@app.event("user.left", version=2)
class UserLeft(BaseModel):
    kind: Literal["left"] = "left"
    user_id: int


@app.event
@dataclass
class UserBanned:
    user_id: int


assert_type(UserMoved(user_id=1).user_id, int)
assert_type(UserLeft(user_id=1).model_dump_json(), str)
assert_type(UserBanned(user_id=1).user_id, int)
UserMoved(user_id="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
UserMoved()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
UserLeft(user="x")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


class UserJoined(BaseModel):
    kind: Literal["joined"]


@app.on(UserMoved, "user.left")
async def note(user: Annotated[UserLeft | UserJoined, Field(discriminator="kind")], message: Message) -> str:
    return user.kind


async def publish() -> None:
    assert_type(await app.publish(UserMoved(user_id=1)), Receipt)
