from kitchen import app

from lightbus.testing import TestBus


def test_a_known_dish_is_cooked() -> None:
    with TestBus(app) as bus:
        bus.publish_sync("order.placed", {"number": 1, "dish": "margherita"}, source="shop")
        bus.drain_sync()
        (cooked,) = bus.handled("cook")
        assert cooked.attempt == 1


def test_an_unknown_dish_becomes_a_dead_letter_after_three_attempts() -> None:
    with TestBus(app) as bus:
        bus.publish_sync("order.placed", {"number": 1, "dish": "sushi"}, source="shop")
        bus.drain_sync()
        (dead,) = bus.dead("cook")
        assert dead.attempt == 3
        assert "sushi" in dead.error
