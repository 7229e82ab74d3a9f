"""Every error survives pickle (process pools, task queues) and copies, with all its attributes."""

from __future__ import annotations

import concurrent.futures
import copy
import importlib
import multiprocessing
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import lightbus
from lightbus import Lightbus, Message, Receipt, errors, transport
from lightbus.message import new_id
from lightbus.transport import Delivery, Publication
from tests.patience import LIMIT


def unpickled(data: bytes) -> Any:
    return pickle.loads(data)  # noqa: S301  # our own


WAYS: dict[str, Callable[[Any], Any]] = {
    **{
        f"pickle-{protocol}": lambda error, protocol=protocol: unpickled(pickle.dumps(error, protocol))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}

# The arguments of error classes that have more than a message.
ARGUMENTS: dict[type[BaseException], tuple[Any, ...]] = {
    errors.PublishManyError: (
        [Receipt("m-1", routed=True), errors.PublishTimeout("the second one was not confirmed")],
    ),
    transport.Unencodable: (Publication("shop", "order.placed", b"{}", {"message_id": "m-1"}),),
}


def all_errors() -> list[type[BaseException]]:
    """Every exception class of the package, whichever module it is in."""
    for module in pkgutil.walk_packages(lightbus.__path__, "lightbus."):
        if module.name.endswith("__main__") or module.name == "lightbus.django.models":  # needs Django's settings
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name not in ("proton", "cproton"):  # not installed where there is no C compiler
                raise

    def below(cls: type[BaseException]) -> Iterator[type[BaseException]]:
        yield cls
        for one in cls.__subclasses__():
            yield from below(one)

    return sorted(
        {one for one in below(BaseException) if one.__module__.partition(".")[0] == "lightbus"},
        key=lambda cls: f"{cls.__module__}.{cls.__name__}",
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", all_errors(), ids=lambda cls: cls.__name__)
def test_an_error_survives_pickle_and_copy(cls: type[BaseException], way: str) -> None:
    error = cls("'shop': it broke. Mend it.", *ARGUMENTS.get(cls, ()))
    error.add_note("while it was tested")
    other = WAYS[way](error)
    assert type(other) is cls
    assert str(other) == str(error)
    assert repr(other) == repr(error)
    assert other.args == error.args
    assert shown(other.__dict__) == shown(error.__dict__)


def shown(attributes: dict[str, Any]) -> str:
    """Exceptions are equal only to themselves."""
    return repr(sorted(attributes.items()))


def test_every_error_that_is_raised_has_a_class_that_is_tested_here() -> None:
    names = {cls.__name__ for cls in all_errors()}
    declared = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BaseException)
    }
    assert declared <= names
    assert "PublishManyError" in names


def fail_to_publish() -> None:
    outcomes: list[Any] = [Receipt("m-1", routed=False), errors.PublishNacked("a queue is full")]
    raise errors.PublishManyError("1 of 2 events was not confirmed", outcomes) from errors.PublishTimeout("cause")


def test_an_error_comes_out_of_a_process_pool() -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(fail_to_publish)
        error = future.exception(LIMIT)
    assert isinstance(error, errors.PublishManyError)
    assert str(error) == "1 of 2 events was not confirmed"
    first, second = error.outcomes
    assert first == Receipt("m-1", routed=False)
    assert (type(second), str(second)) == (errors.PublishNacked, "a queue is full")


@pytest.mark.parametrize("way", WAYS)
def test_receipts_and_messages_survive_pickle_and_copy(way: str) -> None:
    from lightbus.wire.codec import read_message

    channel: Any = None
    delivery = Delivery(
        channel, 1, False, "shop", "order.placed", {"headers": {"a": [1]}, "message_id": new_id()}, b"{}"
    )
    message = read_message("billing", delivery)
    receipt = Receipt(message.id, routed=True)
    assert isinstance(message, Message)
    assert WAYS[way](message) == message
    assert WAYS[way](receipt) == receipt


def test_the_error_of_a_failed_publish_can_be_pickled() -> None:
    app = Lightbus("shop", url="memory://errors-travel")
    with pytest.raises(errors.UnknownEvent) as caught:
        app.publish_sync("order.placed")
    other = unpickled(pickle.dumps(caught.value))
    assert (type(other), str(other)) == (errors.UnknownEvent, str(caught.value))
