"""What the service does with an event. Each test has a separate embedded broker, so no server has to run."""

from lightbus.testing import TestBus

from {{ cookiecutter.__module }} import bus

from . import elsewhere


def test_an_event_leads_to_an_event(lightbus_bus: TestBus) -> None:
    elsewhere.app.publish_sync(elsewhere.{{ cookiecutter.__hears_class }}(id="1"))
    lightbus_bus.drain_sync()
    [published] = lightbus_bus.published(bus.{{ cookiecutter.__event_class }})
    assert published == bus.{{ cookiecutter.__event_class }}(id="1")


def test_an_event_with_a_wrong_field_becomes_a_dead_letter(lightbus_bus: TestBus) -> None:
    lightbus_bus.publish_sync("{{ cookiecutter.hears }}", {"id": None})
    lightbus_bus.drain_sync()
    assert [letter.handler for letter in lightbus_bus.dead()] == ["{{ cookiecutter.__handler }}"]
    assert lightbus_bus.published(bus.{{ cookiecutter.__event_class }}) == []
