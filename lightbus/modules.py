"""Modules of applications: imported by name, with errors that say what is missing or which line failed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import pkgutil
import sys
import threading
import traceback
from collections.abc import Iterable, Sequence
from types import ModuleType

from lightbus import errors

logger = logging.getLogger("lightbus")


class Included:
    """The modules of one `Lightbus(include=)`, imported when `load` is called first."""

    def __init__(self, app: str, names: object) -> None:
        """
        Raises:
            errors.InvalidOption: not a sequence of full module names.
        """
        self.names = _checked(f"Lightbus({app!r})", names)
        self.loaded = False
        self._app = app
        self._loading: set[int] = set()
        """The threads that are in `load`."""
        self._failure: errors.IncludeError | None = None

    def load(self, app: object) -> None:
        """Import them, in their order. A later call does nothing.

        Works from several threads. There is no lock: the lock of a module, which Python holds while it imports it, is
        enough, and with another one two threads could deadlock. Does nothing if one of the modules calls it while it
        is being imported.

        Raises:
            errors.IncludeError: one does not exist, or raised an error. Later calls raise the same: the handlers that
                the module had declared before its error would now be declared twice.
        """
        thread = threading.get_ident()
        if self.loaded or thread in self._loading:
            return
        self._loading.add(thread)
        try:
            self._load(app)
        finally:
            self._loading.discard(thread)
        self.loaded = True

    def _load(self, app: object) -> None:
        for name in self.names:
            if self._failure is not None:
                raise errors.IncludeError(str(self._failure)) from self._failure.__cause__
            try:
                module = importlib.import_module(name)
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's module may raise anything
                cause = None if _is_missing(error, name) else error
                self._failure = self._failure or errors.IncludeError(f"app {self._app!r}: {self._why(name, error)}")
                raise self._failure from cause
            if _uses_a_twin(module, app):
                self._failure = errors.IncludeError(
                    f"app {self._app!r}: include={name!r} uses another Lightbus({self._app!r}), so its handlers would "
                    "not run. The module that creates the app was imported twice: as the program (__main__), and by "
                    "its name. Create the app in a module that is not run as a program, and import it from there."
                )
                raise self._failure
            if left_out := _left_out(module, app):
                logger.warning(
                    "app %r: include=%r is a package that declares nothing, and its modules are not imported with it. "
                    "Include them: %s.",
                    self._app,
                    name,
                    ", ".join(map(repr, left_out)),
                )

    def _why(self, name: str, error: BaseException) -> str:
        folder = _working_directory()
        if isinstance(error, ModuleNotFoundError) and error.name is not None and _is_missing(error, name):
            known = [one for one in sys.modules if "." not in one and one not in sys.stdlib_module_names]
            return f"include={name!r}: {not_found(name, error.name, folder, known)}"
        where = place(error, folder)
        what = f"include={name!r} cannot be imported: {where}{errors.summary(error)}"
        if isinstance(error, ModuleNotFoundError):
            return f"{what}. Install what is missing for {sys.executable}, or correct the import."
        return what


def _is_missing(error: BaseException, name: str) -> bool:
    """Whether the module itself, or one of its packages, does not exist."""
    return (
        isinstance(error, ModuleNotFoundError)
        and error.name is not None
        and (name == error.name or name.startswith(f"{error.name}."))
    )


def files_of(names: Iterable[str]) -> list[str]:
    """The source files of modules and of their packages, whether they are imported or not."""
    paths: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            with contextlib.suppress(Exception):  # a package that raises: importing the module reports it
                spec = importlib.util.find_spec(".".join(parts[:length]))
                if spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
                    paths[os.path.abspath(spec.origin)] = None
    return list(paths)


def _uses_a_twin(module: ModuleType, app: object) -> bool:
    """Whether the module has an app of the same name instead of this one."""
    # Not isinstance: it reads `__class__`, and a proxy, such as Django's settings, would then load what it stands for.
    apps = [value for value in vars(module).values() if issubclass(type(value), type(app))]
    return not any(one is app for one in apps) and any(vars(one)["name"] == vars(app)["name"] for one in apps)


def _left_out(module: ModuleType, app: object) -> list[str]:
    """The modules of a package, if it uses neither them nor the app: probably it was included for their sake."""
    places = list(getattr(module, "__path__", []))
    inner = [f"{module.__name__}.{one.name}" for one in pkgutil.iter_modules(places)]
    if any(one in sys.modules for one in inner) or any(value is app for value in vars(module).values()):
        return []
    return inner


def _checked(owner: str, names: object) -> tuple[str, ...]:
    if isinstance(names, (str, bytes, ModuleType)):
        meant = names.__name__ if isinstance(names, ModuleType) else names
        raise errors.InvalidOption(f"{owner}: include={names!r}: use a list of module names: include=[{meant!r}].")
    if not isinstance(names, Sequence):
        raise errors.InvalidOption(
            f"{owner}: include={names!r}: use a list of module names, as in include=['billing.handlers']."
        )
    return tuple(dict.fromkeys(_checked_name(owner, name) for name in names))


def _checked_name(owner: str, name: object) -> str:
    if isinstance(name, str) and name and all(part.isidentifier() for part in name.split(".")):
        if not name.endswith(".py"):
            return name
        meant = name.removesuffix(".py")
        raise errors.InvalidOption(f"{owner}: include={name!r} is a file. Use the module's name: {meant!r}.")
    if isinstance(name, ModuleType):
        advice = f"Use its name: {name.__name__!r}."
    elif not isinstance(name, str):
        advice = "Use a module's name, as in 'billing.handlers'."
    elif name.startswith("."):
        advice = "Use the module's full name, as in 'billing.handlers': relative names are not resolved."
    elif os.sep in name:
        dotted = name.removesuffix(".py").removeprefix("./").strip("/").replace("/", ".")
        advice = f"This is a path. Use the module's name: {dotted!r}."
    elif "*" in name:
        advice = "Name each module: a package's name includes only the package's own module (__init__.py)."
    else:
        advice = "Use a module's full name, as in 'billing.handlers'."
    raise errors.InvalidOption(f"{owner}: include={name!r} is not a module's name. {advice}")


# --- why a module cannot be imported ----------------------------------------------------------


def not_found(name: str, missing: str, folder: str, known: Iterable[str] = ()) -> str:
    """That a module does not exist, where it was looked for, and the most similar name that does.

    Args:
        name: the module to import.
        missing: the first part of its name that does not exist.
        folder: where top-level modules are looked for.
        known: other top-level modules.
    """
    parent, _, last = missing.rpartition(".")
    if parent:
        package = sys.modules.get(parent)
        places = list(getattr(package, "__path__", []))
        if package is not None and not places:
            return f"no module {missing!r}: {parent!r} is a module, not a package."
        where = f"in the package {parent!r} ({', '.join(places)})"
        names = {module.name for module in pkgutil.iter_modules(places)}
    else:
        where = f"in {folder} or among the packages installed for {sys.executable}"
        names = {module.name for module in pkgutil.iter_modules([folder])} | {*known}
        # namespace packages, too
        names |= {one.name for one in os.scandir(folder) if one.is_dir() and one.name.isidentifier()}
    near = errors.nearest(last, sorted(names))
    if near:
        meant = f"{parent}.{near}" if parent else near
        return f"no module {missing!r} {where}. Did you mean {meant + name[len(missing) :]!r}?"
    return f"no module {missing!r} {where}. Run the command from the root of your code, or set PYTHONPATH."


def place(error: BaseException, folder: str) -> str:
    """`billing/bus.py:12: `, the line of the user's code that caused the error."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not is_machinery(frame.filename)]
    if isinstance(error, SyntaxError) and error.filename is not None:
        path, line = error.filename, error.lineno
    elif frames:
        path, line = frames[-1].filename, frames[-1].lineno
    else:
        return ""
    return f"{os.path.relpath(path, folder) if path.startswith(folder + os.sep) else path}:{line}: "


def is_machinery(filename: str) -> bool:
    """Whether a frame belongs to Lightbus or the standard library. Installed packages may be the user's, too."""
    import sysconfig

    own = os.path.dirname(os.path.abspath(__file__))
    library = sysconfig.get_path("stdlib") + os.sep
    installed = tuple(library + name for name in ("site-packages", "dist-packages"))
    return filename.startswith((own + os.sep, "<frozen ")) or (
        filename.startswith(library) and not filename.startswith(installed)
    )


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # deleted
        return os.sep
