"""The command, as `lightbus` and as `python -m lightbus`."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from typing import NoReturn


def run() -> None:
    """Run the command. Ctrl-C ends it without a traceback, also while Lightbus itself is still being imported."""
    _open_what_is_closed()
    _find_the_standard_library_first()
    try:
        import signal

        end_on_sigterm()
        # A process that ignores Ctrl-C, as in the background of a script, goes on to.
        heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if heeds:
            # No exception: on its way out of an import it may be lost, or renamed (Python 3.11: by __set_name__).
            signal.signal(signal.SIGINT, _leave)
        from lightbus.cli import main, output

        sys.stderr = output.Stderr(sys.stderr)
    except KeyboardInterrupt:
        _leave()
    main(prog_name="lightbus", obj=_interrupt if heeds else None)


def end_on_sigterm() -> None:
    """Let SIGTERM end process 1, as a container's command is. For any other the kernel does it; there it drops a signal
    that nobody handles. Until a worker is there that stops in good order (`lightbus.worker`), nothing has begun.
    """
    import signal

    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))


def _find_the_standard_library_first() -> None:
    """Whatever is called `email.py` in the current folder. Python puts that folder first for `-m`, and Lightbus does to
    load an app: its modules come before what is installed, but must not take the place of the standard library's.
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


def _open_what_is_closed() -> None:
    """Give a process that was started without stdin, stdout or stderr (`2>&-`) one that leads nowhere. Else the next
    file or connection would get its number, and with it all that is written to stderr.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
        if number and getattr(sys, name) is None:  # that stdin is closed is for those to report that read it
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115 - for the life of the process


def _leave(*_: object) -> NoReturn:
    """End at once: nothing has begun."""
    import select

    if select.select([], [2], [], 0)[1]:  # else it would wait for who reads it
        os.write(2, b"Interrupted.\n")
    os._exit(130)


def _interrupt() -> None:
    """Let Ctrl-C be a KeyboardInterrupt from here on."""
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    run()
