"""Rejects invalid names before anything is written.

Cookiecutter runs this as a program. `lightbus new` calls the same functions after each answer.
"""

import builtins
import json
import keyword
import re
import sys

LONGEST = 40
"""Maximum length of a name, so that generated lines are not too long."""

APP = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
EVENT = re.compile(r"[a-z][a-z0-9]*([._-][a-z0-9]+)*")

# Folders of the service, and packages in its environment: a package of the same name would hide them.
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
"""Names that bus.py uses already."""


def check_name(name: str, slug: str) -> None:
    """
    Raises:
        ValueError: a service cannot have this name. The message has the reason and the next step.
    """
    if not name.isprintable():
        raise ValueError(f"the name {name!r} has characters that cannot be printed.")
    if "{" in name:
        raise ValueError(f"the name {name!r} has a brace, which is part of the template's syntax.")
    subject = f"the name {name!r}" + ("" if slug == name else f" becomes {slug!r}, which")
    if not slug:
        raise ValueError(f"the name {name!r} has no letters. Use some, as in 'billing'.")
    if len(slug) > LONGEST:
        raise ValueError(f"{subject} has {len(slug)} characters. The maximum is {LONGEST}: choose a shorter one.")
    if not APP.fullmatch(slug):
        raise ValueError(
            f"{subject} does not begin with a letter. A Python package and an exchange get this name: "
            f"choose another one, such as 'service-{slug}'."
        )
    if slug == "amq":
        raise ValueError(f"{subject} is reserved by RabbitMQ. Choose another one, such as '{slug}-service'.")
    module = slug.replace("-", "_")
    if keyword.iskeyword(module):
        raise ValueError(f"{subject} is a keyword of Python. Choose another one, such as '{slug}-service'.")
    if slug in TAKEN or module in TAKEN or module in sys.stdlib_module_names:
        raise ValueError(
            f"{subject} would hide a module or folder of the same name. Choose another one, such as '{slug}-service'."
        )


def check_event(event: str) -> None:
    """
    Raises:
        ValueError: the template cannot make a class for this event. The message has the reason and the next step.
    """
    if not EVENT.fullmatch(event):
        words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+", event) if event.isascii() else []
        near = ".".join(word.lower() for word in words).lstrip("0123456789.")
        wildcard = " You can use wildcards in bus.py later." if {"*", "#"} & set(event) else ""
        raise ValueError(
            f"{event!r} is not a valid name for an event. Use lower-case words separated by dots, beginning with a "
            f"letter, as in {near or 'invoice.paid'!r}.{wildcard}"
        )
    if len(event) > LONGEST:
        raise ValueError(f"the event {event!r} has {len(event)} characters. The maximum is {LONGEST}.")
    if class_name(event) in CLASSES:
        raise ValueError(
            f"the event {event!r} needs a class {class_name(event)}, but bus.py uses this name already. Choose a "
            f"longer one, such as '{event}.changed'."
        )


def check_pair(event: str, consumes: str) -> None:
    """
    Raises:
        ValueError: both events would have the same class.
    """
    if class_name(event) == class_name(consumes):
        raise ValueError(
            f"the service would publish {event!r} and consume {consumes!r}, in an endless loop. Choose an event of "
            "another service for it to consume."
        )


def class_name(event: str) -> str:
    """`invoice.paid` -> `InvoicePaid`."""
    return "".join(word.capitalize() for word in re.split(r"[._-]", event))


def main(name: str, slug: str, event: str, consumes: str) -> None:
    try:
        check_name(name, slug)
        check_event(event)
        check_event(consumes)
        check_pair(event, consumes)
    except ValueError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main(
        json.loads(r'{{ cookiecutter.name|tojson }}'),
        json.loads(r'{{ cookiecutter.__slug|tojson }}'),
        json.loads(r'{{ cookiecutter.event|tojson }}'),
        json.loads(r'{{ cookiecutter.consumes|tojson }}'),
    )  # fmt: skip
