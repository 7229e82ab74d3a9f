"""Refuses, before anything is written, names of which no service can be made.

Cookiecutter runs this as a program; `lightbus new` asks the same functions after each answer.
"""

import builtins
import json
import keyword
import re
import sys

LONGEST = 40
"""Characters of a name: what is made of it still fits on a line."""

APP = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
EVENT = re.compile(r"[a-z][a-z0-9]*([._-][a-z0-9]+)*")

# Folders of the service, and what its environment has installed: a package of the same name would hide it.
TAKEN = {
    *(
        "build",
        "conftest",
        "deploy",
        "dist",
        "docs",
        "elsewhere",
        "lightbus",
        "lightbus-amqp",
        "src",
        "test",
        "tests",
        "wheels",
    ),
    *("amqp", "anyio", "attr", "attrs", "click", "idna", "kombu", "msgspec", "packaging", "platformdirs"),
    *("outcome", "sniffio", "sortedcontainers", "trio", "typing-extensions", "tzdata", "uvloop", "vine", "watchfiles"),
    *("cfgv", "distlib", "filelock", "hatchling", "identify", "iniconfig", "nodeenv", "pip", "pluggy", "pre-commit"),
    *("pathspec", "py", "pygments", "pytest", "python-discovery", "pyyaml", "ruff", "setuptools", "tomlkit"),
    *("trove-classifiers", "virtualenv", "wheel", "yaml"),
    *("arrow", "binaryornot", "certifi", "charset-normalizer", "cookiecutter", "dateutil", "jinja2", "markdown-it"),
    *("markdown-it-py", "markupsafe", "mdurl", "python-dateutil", "python-slugify", "requests", "rich", "six"),
    *("slugify", "text-unidecode", "urllib3"),
    *("ast-serialize", "librt", "mypy", "mypy-extensions", "mypyc"),
    *("annotationlib", "compression"),  # modules of Python 3.14
}
CLASSES = {*dir(builtins), "AsyncIterator", "Lightbus", "Settings"}
"""What bus.py has already."""


def check_name(name: str, slug: str) -> None:
    """
    Raises:
        ValueError: there can be no service of this name; says why, and what to do.
    """
    if not name.isprintable():
        raise ValueError(f"the name {name!r} has characters that cannot be printed.")
    if "{" in name:
        raise ValueError(f"the name {name!r} has a brace, which the template would read as its own.")
    said = f"the name {name!r}" + ("" if slug == name else f" becomes {slug!r}, which")
    if not slug:
        raise ValueError(f"the name {name!r} has no letters. Use some, as in 'billing'.")
    if len(slug) > LONGEST:
        raise ValueError(f"{said} has {len(slug)} characters; {LONGEST} are the most. Choose a shorter one.")
    if not APP.fullmatch(slug):
        raise ValueError(
            f"{said} does not begin with a letter. It names a Python package and an exchange, so it must: "
            f"as in 'service-{slug}'."
        )
    if slug == "amq":
        raise ValueError(f"{said} is RabbitMQ's own. Choose another one, such as '{slug}-service'.")
    module = slug.replace("-", "_")
    if keyword.iskeyword(module):
        raise ValueError(f"{said} is a word of Python's own. Choose another one, such as '{slug}-service'.")
    if slug in TAKEN or module in TAKEN or module in sys.stdlib_module_names:
        raise ValueError(
            f"{said} would hide a module or folder of the same name. Choose another one, such as '{slug}-service'."
        )


def check_event(event: str) -> None:
    """
    Raises:
        ValueError: the template cannot make a class of this event's name; says why, and what to do.
    """
    if not EVENT.fullmatch(event):
        words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", event) if event.isascii() else []
        near = ".".join(word.lower() for word in words).lstrip("0123456789.")
        wildcard = " Wildcards may come later, in bus.py." if {"*", "#"} & set(event) else ""
        raise ValueError(
            f"{event!r} is no event's name here. Use lower-case words joined by dots, the first one beginning with a "
            f"letter, as in {near or 'invoice.paid'!r}.{wildcard}"
        )
    if len(event) > LONGEST:
        raise ValueError(f"the event {event!r} has {len(event)} characters; {LONGEST} are the most.")
    if class_name(event) in CLASSES:
        raise ValueError(
            f"the event {event!r} would be a class {class_name(event)}, which there is already. Say more, "
            f"as in '{event}.changed'."
        )


def check_pair(event: str, hears: str) -> None:
    """
    Raises:
        ValueError: the two events would be one class.
    """
    if class_name(event) == class_name(hears):
        raise ValueError(
            f"it would say {event!r} and hear {hears!r}: for ever, since it answers what it hears. "
            "Hear an event of another service."
        )


def class_name(event: str) -> str:
    """`invoice.paid` -> `InvoicePaid`."""
    return "".join(word.capitalize() for word in re.split(r"[._-]", event))


def main(name: str, slug: str, event: str, hears: str) -> None:
    try:
        check_name(name, slug)
        check_event(event)
        check_event(hears)
        check_pair(event, hears)
    except ValueError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main(
        json.loads(r'{{ cookiecutter.name|tojson }}'),
        json.loads(r'{{ cookiecutter.__slug|tojson }}'),
        json.loads(r'{{ cookiecutter.event|tojson }}'),
        json.loads(r'{{ cookiecutter.hears|tojson }}'),
    )  # fmt: skip
