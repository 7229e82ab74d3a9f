"""What comes of what it hears. Each test has a broker of its own, so nothing needs to be started."""

from lightbus.testing import TestBus

from {{ cookiecutter.__module }} import bus

from . import elsewhere


def test_what_it_hears_leads_to_what_it_says(lightbus_bus: TestBus) -> None:
    elsewhere.app.publish_sync(elsewhere.{{ cookiecutter.__hears_class }}(id="1"))
    lightbus_bus.drain_sync()
    [said] = lightbus_bus.published(bus.{{ cookiecutter.__event_class }})
    assert said == bus.{{ cookiecutter.__event_class }}(id="1")


def test_what_it_cannot_read_is_kept_as_a_dead_letter(lightbus_bus: TestBus) -> None:
    lightbus_bus.publish_sync("{{ cookiecutter.hears }}", {"id": None})
    lightbus_bus.drain_sync()
    assert [letter.handler for letter in lightbus_bus.dead()] == ["{{ cookiecutter.__handler }}"]
    assert lightbus_bus.published(bus.{{ cookiecutter.__event_class }}) == []
