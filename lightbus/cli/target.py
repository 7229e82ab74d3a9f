"""Loads the app that `MODULE:ATTR` names. Errors are one line."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lightbus import Lightbus


def load_app(target: str) -> Lightbus:
    """The app that `billing.bus:app` names. `billing.bus` is enough if the module has one app.

    Raises:
        errors.TargetError: there is no such app, or its module cannot be imported.
    """
    from lightbus import Lightbus, errors

    module_name, _, attribute = target.partition(":")
    _check_spelling(target, module_name)
    folder = os.getcwd()
    # First, even if it is in the path already: two services that are installed as editable both have `tests`.
    if sys.path[:1] != [folder]:
        sys.path.insert(0, folder)
    _check_name(module_name.partition(".")[0], folder)
    module = _import(module_name, folder)
    if not attribute:
        return _only_app(module)
    found: Any = module
    for name in attribute.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise errors.TargetError(f"module {module_name!r} has no {attribute!r}. {_apps_in(module)}") from None
    if not isinstance(found, Lightbus):
        what = f"the class {found.__name__}" if isinstance(found, type) else f"of type {type(found).__name__}"
        raise errors.TargetError(f"{target} is {what}, not a Lightbus. {_apps_in(module)}")
    return found


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
    from lightbus import errors

    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise errors.TargetError(_not_found(name, error.name, folder)) from None
        _show_traceback(error)
        raise errors.TargetError(
            f"module {name!r} cannot be imported by {sys.executable}. Install its dependencies there, or activate the "
            "environment that has them."
        ) from None
    except errors.LightbusError as error:  # the message has the next step. Add the place
        raise errors.TargetError(f"{_place(error, folder)}{type(error).__name__}: {error}") from None
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's module may raise anything while it is imported
        _show_traceback(error)
        raise errors.TargetError(f"module {name!r} cannot be imported: see above.") from None


def _place(error: BaseException, folder: str) -> str:
    """`billing/bus.py:12: `, the line of the user's code that caused the error."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_machinery(frame.filename)]
    if not frames:
        return ""
    path = frames[-1].filename
    return f"{os.path.relpath(path, folder) if path.startswith(folder + os.sep) else path}:{frames[-1].lineno}: "


def _show_traceback(error: BaseException) -> None:
    """Show the traceback with the frames of the user's code only."""
    from lightbus import errors

    text = errors.format_traceback(error, hidden=lambda frame: _is_machinery(frame.f_code.co_filename))
    click.echo(text, nl=False, err=True)


def _is_machinery(filename: str) -> bool:
    """Whether a frame belongs to Lightbus or the standard library. Installed packages may be the user's, too."""
    import sysconfig

    own = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    library = sysconfig.get_path("stdlib") + os.sep
    installed = tuple(library + name for name in ("site-packages", "dist-packages"))
    return filename.startswith((own + os.sep, "<frozen ")) or (
        filename.startswith(library) and not filename.startswith(installed)
    )


def _not_found(name: str, missing: str, folder: str) -> str:
    from lightbus import errors

    parent, _, last = missing.rpartition(".")
    if parent:
        package = sys.modules.get(parent)
        places = list(getattr(package, "__path__", []))
        if package is not None and not places:
            return f"no module {missing!r}: {parent!r} is a module, not a package. {_apps_in(package)}"
        where = f"in the package {parent!r} ({', '.join(places)})"
    else:
        places = [folder]
        where = f"in {folder} or among the packages installed for {sys.executable}"
    names = [module.name for module in pkgutil.iter_modules(places)]
    if not parent:  # namespace packages, too
        names += [one.name for one in os.scandir(folder) if one.is_dir() and one.name.isidentifier()]
    near = errors.nearest(last, sorted(set(names)))
    if near:
        meant = f"{parent}.{near}" if parent else near
        return f"no module {missing!r} {where}. Did you mean {meant + name[len(missing) :]!r}?"
    return f"no module {missing!r} {where}. Run the command from the root of your code, or set PYTHONPATH."


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
