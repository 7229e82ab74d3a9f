"""Loads the app that `MODULE:ATTR` names. Errors are one line."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightbus import Lightbus


def load_app(target: str) -> Lightbus:
    """The app that `billing.bus:app` names, with the handlers of the modules that it includes.

    Raises:
        errors.TargetError: there is no such app, or its module cannot be imported.
        errors.IncludeError: a module that the app includes cannot be imported.
    """
    app = find_app(target)
    load_handlers(app)
    return app


def find_app(target: str) -> Lightbus:
    """The app that `billing.bus:app` names. `billing.bus` is enough if the module has one app.

    Raises:
        errors.TargetError: there is no such app, or its module cannot be imported.
    """
    from lightbus import Lightbus, errors

    module, found = _find(target)
    if not isinstance(found, Lightbus):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise errors.TargetError(f"{target} is {what}, not a Lightbus. {_apps_in(module)}")
    return found


def find_outbox(target: str) -> tuple[Lightbus, Any]:
    """An app, and the outbox if that is what `billing.bus:outbox` names, else None.

    Raises:
        errors.TargetError: there is neither, or the module cannot be imported.
    """
    from lightbus import Lightbus

    _, found = _find(target)
    app = getattr(found, "app", None)
    if isinstance(app, Lightbus) and hasattr(found, "relay"):
        return app, found
    return find_app(target), None


def _find(target: str) -> tuple[ModuleType, Any]:
    """The module, and what is named in it."""
    from lightbus import errors

    module_name, _, attribute = target.partition(":")
    _check_spelling(target, module_name)
    folder = os.getcwd()
    # First, even if it is in the path already: two services that are installed as editable both have `tests`.
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    _check_name(module_name.partition(".")[0], folder)
    module = _import(module_name, folder)
    if not attribute:
        return module, _only_app(module)
    found: Any = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise errors.TargetError(f"module {module_name!r} has no {attribute!r}. {_apps_in(module)}") from None
    return module, found


def load_handlers(app: Lightbus) -> None:
    """Import the modules that the app includes: every command needs their handlers.

    Raises:
        errors.IncludeError: one of the modules cannot be imported.
    """
    from lightbus import errors

    try:
        app.load()
    except errors.IncludeError as error:
        if error.__cause__ is not None and not isinstance(error.__cause__, errors.LightbusError):
            _show_traceback(error.__cause__)
        raise


def _check_spelling(target: str, module_name: str) -> None:
    from lightbus import errors

    if "@" in target or "://" in target:  # it may contain a password, so do not show it
        raise errors.TargetError("This is a broker URL, not MODULE:ATTR. Set LIGHTBUS_URL to it instead.")
    if all(part.isidentifier() for part in module_name.split(".")) and not module_name.endswith(".py"):
        return
    path, _, attribute = target.partition(":")
    if path.endswith(".py") or os.sep in path:
        dotted = path.removesuffix(".py").removesuffix("/").removeprefix("./").replace("/", ".").strip(".")
        raise errors.TargetError(
            f"{target!r} is a file path. Use the module name, from the current directory: {dotted}:{attribute or 'app'}"
        )
    raise errors.TargetError(f"{target!r} is not MODULE:ATTR, as in billing.bus:app")


def _check_name(name: str, folder: str) -> None:
    """The standard library takes precedence over the folder: see lightbus/__main__.py."""
    from lightbus import errors

    for namesake in (f"{name}.py", name):
        if name in sys.stdlib_module_names and os.path.exists(os.path.join(folder, namesake)):
            raise errors.TargetError(
                f"{name!r} is a module of Python's standard library, which takes precedence. Rename "
                f"{namesake} in {folder}."
            )


def _import(name: str, folder: str) -> ModuleType:
    from lightbus import errors, modules

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            reason = modules.not_found(name, error.name, folder)
            package = sys.modules.get(error.name.rpartition(".")[0])
            if package is not None and not hasattr(package, "__path__"):
                reason = f"{reason} {_apps_in(package)}"
            raise errors.TargetError(reason) from None
        _show_traceback(error)
        raise errors.TargetError(
            f"module {name!r} cannot be imported by {sys.executable}. Install its dependencies there, or activate the "
            "environment that has them."
        ) from None
    except errors.LightbusError as error:  # the message has the next step. Add the place
        raise errors.TargetError(f"{modules.place(error, folder)}{type(error).__name__}: {error}") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's module may raise anything while it is imported
        _show_traceback(error)
        raise errors.TargetError(f"module {name!r} cannot be imported: see above.") from None


def _show_traceback(error: BaseException) -> None:
    """Show the traceback with the frames of the user's code only."""
    from lightbus import errors, modules
    from lightbus.cli import logs

    text = errors.format_traceback(error, hidden=lambda frame: modules.is_machinery(frame.f_code.co_filename))
    logs.show_traceback(text)


def _apps(module: ModuleType) -> dict[str, Lightbus]:
    from lightbus import Lightbus

    return {name: value for name, value in vars(module).items() if isinstance(value, Lightbus)}


def _apps_in(module: ModuleType) -> str:
    apps = _apps(module)
    if not apps:
        where = module.__file__ or module.__name__
        return f"There is no Lightbus app in {where}: app = Lightbus('{_guess(module)}') creates one."
    return f"Did you mean {' or '.join(f'{module.__name__}:{name}' for name in apps)}?"


def _guess(module: ModuleType) -> str:
    return module.__name__.partition(".")[0].lower().strip("_") or "billing"


def _only_app(module: ModuleType) -> Lightbus:
    from lightbus import errors

    apps = _apps(module)
    if not apps:
        raise errors.TargetError(f"{module.__name__!r} is not MODULE:ATTR. {_apps_in(module)}")
    if len({id(app) for app in apps.values()}) > 1:
        raise errors.TargetError(
            f"module {module.__name__!r} has several apps. Name one: "
            f"{' or '.join(f'{module.__name__}:{name}' for name in apps)}"
        )
    return next(iter(apps.values()))
