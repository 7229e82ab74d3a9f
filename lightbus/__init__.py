"""Lightbus: an event bus for Python applications over AMQP."""

import os

if os.name != "posix":  # else the missing os.register_at_fork would be told as `cannot import name 'Lightbus'`
    raise ImportError("Lightbus runs on Linux, not on Windows. Use it in WSL or in a container.")

TYPE_CHECKING = False  # as in typing, which takes longer to import than all that is here
if TYPE_CHECKING:
    from lightbus import errors
    from lightbus.app import Lightbus
    from lightbus.errors import Reject
    from lightbus.message import Message, Receipt
    from lightbus.retry import Retry
else:

    def __getattr__(name: str) -> object:
        """Import a public name when it is asked for: Tab, `--version` and Ctrl-C on a command line wait for none."""
        import importlib

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(_HOMES[name])
        found = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
        globals()[name] = found
        return found


__version__ = "0.1.0"

__all__ = ["Lightbus", "Message", "Receipt", "Reject", "Retry", "errors"]

_HOMES = {
    "Lightbus": "lightbus.app",
    "Message": "lightbus.message",
    "Receipt": "lightbus.message",
    "Reject": "lightbus.errors",
    "Retry": "lightbus.retry",
    "errors": "lightbus.errors",
}
