"""The addresses on Artemis follow the names that `wire.topology` gives: the transport may not import it."""

from __future__ import annotations

import pytest

from lightbus.transport import Publication
from lightbus.transport.activemq import names
from lightbus.wire import topology


def test_the_fixed_names_are_those_of_the_topology() -> None:
    assert (names.BUS, names.INTERNAL, names.DEAD) == (topology.BUS, topology.INTERNAL, topology.DEAD_KEY)
    assert (names.CATALOG, names.CONTRACT) == (topology.CATALOG, topology.CONTRACT_KEY)


@pytest.mark.parametrize("suffix", [topology.MAIN, "slow", "slow.retry", "retry"])
@pytest.mark.parametrize(("delay", "milliseconds"), [(0.05, 50), (5.0, 5000), (2_591_999.999, 2_591_999_999)])
def test_the_key_and_the_queue_of_a_retry_are_read(suffix: str, delay: float, milliseconds: int) -> None:
    key = topology.retry_key(suffix, delay)
    assert names.retry_of(key) == (suffix, milliseconds)
    assert names.retry_queue_of(f"my-app.{key}") == (topology.queue_name("my-app", suffix), milliseconds)


@pytest.mark.parametrize(
    "queue", ["billing.main", "billing.retry", "billing.dead", "billing.retry-5s", "lightbus.catalog"]
)
def test_other_queues_are_not_those_of_retries(queue: str) -> None:
    assert names.retry_queue_of(queue) is None


def test_everything_of_delayed_publishing_is_known_by_its_name() -> None:
    wanted = topology.delaying("my-app", 3, "quorum")
    own = [one.name for one in (*wanted.exchanges, *wanted.queues) if one.name != "my-app"]
    assert len(own) == 10
    assert {names.delaying_app(name) for name in own} == {"my-app"}
    assert names.delaying_app("my-app") is names.delaying_app("my-app.internal") is None


@pytest.mark.parametrize("delay", [1, 5, 86_400, 2_591_999])
def test_the_delay_of_a_publication_is_read_from_its_headers(delay: int) -> None:
    pytest.importorskip("proton")
    from lightbus.transport.activemq.channel import delay_of

    publication, _ = topology.delayed(Publication("shop", "a", b"{}", {"headers": {}}), delay)
    assert delay_of(publication.properties) == delay
    assert names.delaying_app(publication.exchange) == "shop"


@pytest.mark.parametrize("user", ["billing", "a.b", "x#y*", "\u00fc@host"])
def test_a_user_has_an_address_for_answers_without_wildcards(user: str) -> None:
    address = names.reply_address(user)
    assert address.startswith(names.REPLIES)
    assert not set(address.removeprefix(names.REPLIES)) & set(".#*:")
