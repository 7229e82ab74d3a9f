"""Lightbus: an event bus for Python applications over AMQP."""

import os

if os.name != "posix":  # else os.register_at_fork is missing, and Python reports only `cannot import name 'Lightbus'`
    raise ImportError("Lightbus runs on Linux, not on Windows. Use it in WSL or in a container.")

TYPE_CHECKING = False  # type checkers know this name. `typing` would take longer to import than this whole module
if TYPE_CHECKING:
    from lightbus import errors
    from lightbus.app import Lightbus
    from lightbus.dependencies import Depends, State
    from lightbus.errors import Reject
    from lightbus.message import Message, Receipt
    from lightbus.middleware import Next, NextSync
    from lightbus.outcome import Outcome
    from lightbus.retry import Retry
    from lightbus.version import __version__ as __version__
    from lightbus.wire.codec import current_message
else:

    def __getattr__(name: str) -> object:
        """Import a public name on first use: so `--version`, Tab completion and Ctrl-C are fast on a command line."""
        import importlib

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(_HOMES[name])
        found = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
        globals()[name] = found
        return found


__all__ = [
    "Depends",
    "Lightbus",
    "Message",
    "Next",
    "NextSync",
    "Outcome",
    "Receipt",
    "Reject",
    "Retry",
    "State",
    "current_message",
    "errors",
]

_HOMES = {
    "Depends": "lightbus.dependencies",
    "Lightbus": "lightbus.app",
    "Message": "lightbus.message",
    "Next": "lightbus.middleware",
    "NextSync": "lightbus.middleware",
    "Outcome": "lightbus.outcome",
    "Receipt": "lightbus.message",
    "Reject": "lightbus.errors",
    "Retry": "lightbus.retry",
    "State": "lightbus.dependencies",
    "__version__": "lightbus.version",
    "current_message": "lightbus.wire.codec",
    "errors": "lightbus.errors",
}
