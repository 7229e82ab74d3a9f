"""`lightbus new`: a new service, from the template in cookiecutter/."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import shlex
import shutil
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType

import attrs
import click

import lightbus
from lightbus import errors
from lightbus.cli import asking, output

EPILOG = """\b
Examples:
  lightbus new                         (asks for all answers)
  lightbus new billing
  lightbus new billing --event invoice.paid --consumes user.registered --no-input
  lightbus new ~/src/intake --name 'Order Intake'

\b
Exit codes:
  0    created
  1    not created: cookiecutter is missing, or the template could not be rendered
  2    the command line or an answer is invalid, or the folder is not empty
  130  interrupted: nothing is created
"""


@click.command(short_help="Create a new service from a template.", epilog=EPILOG)
@click.argument("folder", required=False, type=click.Path(file_okay=False, path_type=Path))
@click.option("--name", help="The name of the service.  [default: as FOLDER]")
@click.option("--event", metavar="NAME", help="The event that it publishes, for example invoice.paid.")
@click.option(
    "--consumes", metavar="NAME", help="The event of another service that it consumes, for example user.registered."
)
@click.option("--no-input", is_flag=True, help="Do not ask: use the examples for what is not given.")
def new(folder: Path | None, name: str | None, event: str | None, consumes: str | None, no_input: bool) -> None:
    """Create a new service: handlers, settings, tests, a type checker, a container, RabbitMQ for a laptop, systemd, CI.

    FOLDER is the target folder, and the name of the service unless --name is given. It must be empty or not exist yet.

    Needs cookiecutter, the extra `template` of lightbus-amqp: pip install cookiecutter. (`cookiecutter` with the
    template's folder does the same.)
    """
    _need_cookiecutter()
    if folder is not None:
        _require_empty(folder)
        name = folder.resolve().name if name is None else name
    service = _ask(name, event, consumes, no_input)
    target = Path(service.slug) if folder is None else folder
    _require_empty(target)
    _make(service, target)
    change_folder = "" if target.resolve() == Path.cwd() else f"  cd {shlex.quote(str(target))}\n"
    output.report(
        f"Created {target}: the app {service.slug!r} publishes {service.event} and handles {service.consumes}.\n\n"
        # This environment has the required version of lightbus-amqp, so pip needs no index for it.
        f"Next, in the environment of this command:\n{change_folder}"
        "  pip install --requirement requirements-dev.txt\n  make check\n\n"
        "README.md shows how to set up an environment for the service alone, and how to run and deploy it."
    )


@attrs.frozen
class Service:
    """The answers."""

    name: str
    slug: str
    event: str
    consumes: str


def _template() -> Path:
    """The folder of the template: cookiecutter/ in a clone, which the wheel has as lightbus/_template."""
    package = Path(lightbus.__file__).parent
    installed = package / "_template"
    return installed if installed.exists() else package.parent / "cookiecutter"


def _need_cookiecutter() -> None:
    """
    Raises:
        errors.LightbusError: cookiecutter is not installed.
    """
    try:
        importlib.import_module("cookiecutter.main")
    except ModuleNotFoundError:
        raise errors.LightbusError(
            "`lightbus new` needs cookiecutter, which is not installed here: pip install cookiecutter"
        ) from None


def _require_empty(folder: Path) -> None:
    """
    Raises:
        click.UsageError: the folder is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise click.UsageError(f"{folder} is not empty. Use a folder that does not exist yet.")


# --- the answers ------------------------------------------------------------------------------


def _ask(name: str | None, event: str | None, consumes: str | None, no_input: bool) -> Service:
    """Ask for what is not given, until the answer is valid. An invalid option is a click.UsageError."""
    rules = template_rules()
    asked = json.loads((_template() / "cookiecutter.json").read_text(encoding="utf-8"))

    def answer(key: str, given: str | None, *checks: Callable[[str], None]) -> str:
        def checked(text: str) -> str:
            try:
                for check in checks:
                    check(text)
            except ValueError as error:
                raise click.UsageError(str(error)) from None
            return text

        default: str = asked[key]
        if given is not None or no_input:
            return checked(default if given is None else given)
        with asking("--no-input"):
            answered: str = click.prompt(asked["__prompts__"][key], default=default, value_proc=checked)
        return answered

    name = answer("name", name, lambda text: rules.check_name(text, _slug(text)))
    event = answer("event", event, rules.check_event)
    consumes = answer("consumes", consumes, rules.check_event, lambda text: rules.check_pair(event, text))
    return Service(name, _slug(name), event, consumes)


def _slug(name: str) -> str:
    """The same slug as in the template."""
    from slugify import slugify

    return slugify(name)


def template_rules() -> ModuleType:
    """The checks of the template's hook, so that an invalid answer is asked for again at once."""
    path = _template() / "hooks" / "pre_gen_project.py"
    spec = importlib.util.spec_from_file_location("lightbus_template_rules", path)
    assert spec is not None
    assert spec.loader is not None
    rules = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rules)
    return rules


# --- the folder -------------------------------------------------------------------------------


def _make(service: Service, target: Path) -> None:
    """Render the template in a temporary folder and move the result. A failure or an interruption leaves nothing."""
    from cookiecutter.exceptions import CookiecutterException
    from cookiecutter.main import cookiecutter

    with _scratch(target) as scratch:
        # Without compiled files, which would become part of the service.
        ignore = shutil.ignore_patterns("__pycache__", ".*_cache")
        template = shutil.copytree(_template(), scratch / "template", ignore=ignore)
        try:
            made = cookiecutter(
                str(template),
                no_input=True,
                extra_context={"name": service.name, "event": service.event, "consumes": service.consumes},
                output_dir=str(scratch / "made"),
                # Ignore the user's settings for cookiecutter, and write no replay file to their home folder.
                default_config={"replay_dir": str(scratch / "replay")},  # type: ignore[arg-type]
            )
        except CookiecutterException as error:
            raise errors.LightbusError(f"the template could not be rendered: {error}") from error
        if target.exists():
            for one in Path(made).iterdir():
                one.rename(target / one.name)
        else:
            Path(made).rename(target)


@contextlib.contextmanager
def _scratch(target: Path) -> Generator[Path]:
    """A temporary folder on the same file system, in the target if it exists: the user may not write beside it."""
    place = target if target.exists() else target.resolve().parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=".lightbus-new-", dir=place))
    except OSError as error:
        raise click.UsageError(f"{target} cannot be created: {error.strerror}.") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
