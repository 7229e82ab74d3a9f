"""The command, as `lightbus` and as `python -m lightbus`."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from typing import NoReturn


def run() -> None:
    """Run the command. Ctrl-C ends it without a traceback, even while Lightbus is being imported."""
    _open_standard_streams()
    _prefer_standard_library()
    try:
        import signal

        end_on_sigterm()
        # A process that ignores SIGINT, as in the background of a script, keeps ignoring it.
        interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if interruptible:
            # Without an exception: an import can lose or replace it (Python 3.11: __set_name__).
            signal.signal(signal.SIGINT, _leave)
        from lightbus.cli import main, output

        sys.stderr = output.Stderr(sys.stderr)
    except KeyboardInterrupt:
        _leave()
    main(prog_name="lightbus", obj=_raise_keyboard_interrupt if interruptible else None)


def end_on_sigterm() -> None:
    """Let SIGTERM end process 1, which the command of a container is. For process 1, the kernel ignores a signal
    without a handler. A worker installs its own handler later (`lightbus.worker`).
    """
    import signal

    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))


def _prefer_standard_library() -> None:
    """Import the standard library's modules, even if the current folder has an `email.py`. Python puts that folder
    first for `-m`, and Lightbus does to load an app: its modules come before installed packages, but not before these.
    """
    from importlib.machinery import PathFinder

    try:
        folder = os.getcwd()
    except FileNotFoundError:
        return

    class StandardLibrary:
        @staticmethod
        def find_spec(name: str, path: object = None, _target: object = None) -> ModuleSpec | None:
            if path is not None or name not in sys.stdlib_module_names:
                return None
            return PathFinder.find_spec(name, [entry for entry in sys.path if entry not in ("", folder)])

    before = sys.meta_path.index(PathFinder) if PathFinder in sys.meta_path else len(sys.meta_path)
    sys.meta_path.insert(before, StandardLibrary)


def _open_standard_streams() -> None:
    """Open /dev/null for each of stdin, stdout and stderr that is closed (`2>&-`). Otherwise the next file or
    connection gets its number, and receives what is written to stderr.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number
        if number and getattr(sys, name) is None:  # a closed stdin is reported where it is read
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for the life of the process


def _leave(*_: object) -> NoReturn:
    """Exit at once: the command has not started yet."""
    import select

    if select.select([], [2], [], 0)[1]:  # do not wait for a reader of stderr
        os.write(2, b"Interrupted.\n")
    os._exit(130)


def _raise_keyboard_interrupt() -> None:
    """From here on, Ctrl-C raises KeyboardInterrupt."""
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    run()
