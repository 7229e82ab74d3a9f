from kitchen import app

from lightbus.testing import TestBus


def test_a_margherita_is_cooked_at_once() -> None:
    with TestBus(app) as bus:
        bus.publish_sync("order.placed", {"number": 1, "dish": "margherita"}, source="shop")
        bus.drain_sync()
        (cooked,) = bus.handled("cook")
        assert cooked.attempt == 1


def test_an_unknown_dish_is_a_dead_letter_after_three_attempts() -> None:
    with TestBus(app) as bus:
        bus.publish_sync("order.placed", {"number": 1, "dish": "sushi"}, source="shop")
        bus.drain_sync()
        (letter,) = bus.dead("cook")
        assert letter.attempt == 3
        assert "sushi" in letter.error
