"""Handlers. Each test uses a separate embedded broker, so no server is needed."""

from lightbus.testing import TestBus

from {{ cookiecutter.__module }} import bus

from . import elsewhere


def test_a_consumed_event_leads_to_a_published_event(lightbus_bus: TestBus) -> None:
    elsewhere.app.publish_sync(elsewhere.{{ cookiecutter.__consumed_class }}(id="1"))
    lightbus_bus.drain_sync()
    [published] = lightbus_bus.published(bus.{{ cookiecutter.__event_class }})
    assert published == bus.{{ cookiecutter.__event_class }}(id="1")


def test_an_event_with_an_invalid_field_becomes_a_dead_letter(lightbus_bus: TestBus) -> None:
    lightbus_bus.publish_sync("{{ cookiecutter.consumes }}", {"id": None})
    lightbus_bus.drain_sync()
    assert [dead.handler for dead in lightbus_bus.dead()] == ["{{ cookiecutter.__handler }}"]
    assert lightbus_bus.published(bus.{{ cookiecutter.__event_class }}) == []
