"""Lightbus: an event bus for Python applications over AMQP."""

from lightbus import errors
from lightbus.app import Lightbus
from lightbus.errors import Reject
from lightbus.message import Message, Receipt
from lightbus.retry import Retry

__version__ = "0.1.0"

__all__ = ["Lightbus", "Message", "Receipt", "Reject", "Retry", "errors"]
