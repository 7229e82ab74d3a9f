"""The printed parts of broker.xml: well-formed, and each queue and role is named."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from lightbus.transport.activemq import broker_xml, names


def parsed(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(f"<all>{text}</all>")


def rights(text: str) -> dict[str, dict[str, set[str]]]:
    """The roles by permission, by match."""
    return {
        setting.attrib["match"]: {
            permission.attrib["type"]: {*permission.attrib["roles"].split(",")} for permission in setting
        }
        for setting in parsed(text).iter("security-setting")
    }


def test_the_administrators_part_has_each_element_once() -> None:
    found = [element.tag for element in parsed(broker_xml.administrator())]
    assert found == [
        *("management-message-rbac", "message-expiry-scan-period"),
        *("addresses", "diverts", "address-settings", "security-settings"),
    ]


def test_the_fixed_addresses_are_those_of_the_administrators_part() -> None:
    found = parsed(broker_xml.administrator()).iterfind("addresses/address")
    assert tuple(each.attrib["name"] for each in found) == broker_xml.FIXED_ADDRESSES


def test_the_diverts_match_the_addresses_of_apps_only() -> None:
    found = {
        each.findtext("address"): (each.findtext("forwarding-address"), each.findtext("exclusive"))
        for each in parsed(broker_xml.administrator()).iterfind("diverts/divert")
    }
    assert found == {
        names.exchange_address("*"): (names.BUS_ADDRESS, "true"),
        f"{names.CONTRACTS}*": (names.CATALOG, "true"),
    }


def test_no_app_may_send_to_a_shared_address_but_for_management() -> None:
    found = rights(broker_xml.administrator())
    sending = {match for match, types in found.items() if broker_xml.SHARED_ROLE in types.get("send", ())}
    assert sending == {names.MANAGEMENT}


def test_an_app_may_change_nothing_by_management() -> None:
    both = broker_xml.administrator() + broker_xml.permissions("billing", ["billing.main"])
    editing = [types["edit"] for types in rights(both).values() if "edit" in types]
    assert len(editing) == 7
    assert all(roles == {"amq"} for roles in editing)


def test_an_apps_permissions_are_on_its_own_names() -> None:
    found = rights(broker_xml.permissions("billing", ["billing.main", "billing.slow"]))
    assert [*found] == [
        *("lightbus.exchange.billing", "lightbus.delay.billing", "lightbus.contract.billing"),
        *("lightbus.bus::billing.main", "lightbus.bus::billing.slow", "lightbus.dead::billing.dead"),
        *("lightbus.reply.billing.#", "mops.queue.billing.#"),
    ]
    roles = {role for types in found.values() for each in types.values() for role in each}
    assert roles == {"lightbus.billing", "amq"}


def test_the_administrators_have_every_right_that_an_app_has() -> None:
    both = broker_xml.administrator("operators") + broker_xml.permissions("billing", [], admin_role="operators")
    assert all("operators" in roles for types in rights(both).values() for roles in types.values())


@pytest.mark.parametrize("user", [None, "billing-prod"])
def test_the_roles_of_the_user_are_shown(user: str | None) -> None:
    text = broker_xml.permissions("billing", [], user=user)
    assert f"lightbus = {user or 'billing'} " in text
    assert f"lightbus.billing = {user or 'billing'} -->" in text


def test_a_selector_is_escaped() -> None:
    selector = """"m.x-opt-ORIG-ADDRESS" IS NULL OR JMSType <> 'a&b'"""
    (address,) = parsed(broker_xml.queues({"billing.main": selector}))
    assert address.attrib["name"] == "lightbus.bus"
    ((element,),) = address
    assert element.attrib["name"] == "billing.main"
    assert element[0].attrib["string"] == selector
