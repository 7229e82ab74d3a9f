"""Pydantic models as events and as payloads. Try it: lightbus worker accounts:app"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from lightbus import Lightbus

app = Lightbus("accounts")


class Event(BaseModel):
    """What all events of this app have in common."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, validate_by_name=True)

    user_id: int = Field(gt=0)  # "userId" in the body


@app.event  # published as "account.opened"
class AccountOpened(Event):
    kind: Literal["opened"] = "opened"
    email: str


@app.event
class AccountClosed(Event):
    kind: Literal["closed"] = "closed"
    reason: str = ""


class Account(BaseModel):  # a handler's view of an event: only the fields that it needs
    email: str


@app.on("account.opened")
async def welcome(account: Account) -> None:
    print(f"Welcome, {account.email}!", flush=True)


@app.on("account.*")
async def audit(change: Annotated[AccountOpened | AccountClosed, Field(discriminator="kind")]) -> None:
    match change:
        case AccountOpened():
            print(f"{change.user_id} opened an account", flush=True)
        case AccountClosed():
            print(f"{change.user_id} closed the account: {change.reason or 'no reason'}", flush=True)
