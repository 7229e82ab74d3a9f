"""Installing Lightbus: `python -m build` makes a wheel and an sdist, and each works in an empty environment. So does a
service that `lightbus new` creates, as its README and its Dockerfile install it.

pip finds the requirements of Lightbus and of the service, but no `lightbus-amqp`: it is on no index yet.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import lightbus
from tests import wheelhouse
from tests.processes import LIMIT, ROOT, Program, wait_until
from tests.rabbitmq import free_port

VERSION = lightbus.__version__
PAGE = (ROOT / "docs" / "howto" / "install.md").read_text()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PyPI has: Lightbus' requirements, and the tools of the build and of a service."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    tools = (*wheelhouse.BUILD, "mypy", "pytest", "ruff")
    names = [name for one in tools for name in wheelhouse.requirements_of(one)]
    wheelhouse.fill(
        folder, {*names, *wheelhouse.requirements_of("lightbus-amqp", {"template", "trio"})} - {"lightbus-amqp"}
    )
    return folder


@pytest.fixture(scope="module")
def built(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return wheelhouse.build(tmp_path_factory.mktemp("dist"), wheels)


def test_the_files_have_the_name_of_the_distribution(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    assert wheel.name == f"lightbus_amqp-{VERSION}-py3-none-any.whl"
    assert sdist.name == f"lightbus_amqp-{VERSION}.tar.gz"


def test_the_wheel_has_the_package_and_nothing_else_at_the_top(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.partition("/")[0] for name in names} == {"lightbus", f"lightbus_amqp-{VERSION}.dist-info"}
    assert "lightbus/py.typed" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "lightbus").rglob("*.py")}
    assert sources <= set(names)


def test_the_sdist_has_the_tests_and_the_documentation(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "docs/index.md", "tests/conftest.py"} <= names


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_into_an_empty_environment_and_the_demo_runs(
    kind: str, built: tuple[Path, Path], wheels: Path, tmp_path: Path
) -> None:
    wheel, sdist = built
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    python = wheelhouse.empty_environment(tmp_path / "venv")

    def run(*command: str | Path) -> str:
        return wheelhouse.run(command, elsewhere, wheels, TMPDIR=str(tmp_path), HOME=str(tmp_path))

    run(python, "-m", "pip", "install", f"{wheel}[template,trio]" if kind == "wheel" else sdist)
    run(python, "-m", "pip", "check")
    assert f"lightbus-amqp=={VERSION}" in run(python, "-m", "pip", "list", "--format=freeze").splitlines()
    origin = run(python, "-c", "import lightbus; print(lightbus.__file__)")
    assert origin.startswith(str(tmp_path / "venv"))
    command = python.parent / "lightbus"
    assert run(command, "--version") == f"lightbus {VERSION}\n"
    output = run(command, "demo", "--events", "200")
    assert "(embedded: no server)" in output
    assert "All events were handled as expected" in output
    # A broker's administrators see this version.
    assert f"Lightbus embedded broker {VERSION}" in run(command, "doctor", f"sqlite:///{tmp_path}/bus.db")


def test_the_page_names_the_files_the_version_and_the_extras(built: tuple[Path, Path]) -> None:
    assert f"$ pip install wheels/{built[0].name}\n" in PAGE
    assert f"$ lightbus --version\nlightbus {VERSION}\n" in PAGE
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\w, -]+) \|", PAGE, re.MULTILINE))
    extras = project["optional-dependencies"].items()
    assert rows == {extra: ", ".join(re.split(r"[^\w-]", one)[0] for one in needs) for extra, needs in extras}


def test_a_project_that_requires_it_is_installed_with_the_wheel_as_the_page_says(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "shop.py").touch()
    (dependencies,) = re.findall(r"^dependencies = .*$", PAGE, re.MULTILINE)
    (tmp_path / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "shop"\nversion = "1"\n{dependencies}\n'
        '[tool.hatch.build]\ninclude = ["shop.py"]\n'
    )
    python = wheelhouse.empty_environment(tmp_path / ".venv")
    for command in ("pip wheel --no-deps --wheel-dir wheels ~/lightbus", "pip install wheels/*.whl --editable ."):
        assert f"$ {command}\n" in PAGE
        here = command.replace("~/lightbus", shlex.quote(str(ROOT)))
        wheelhouse.run(["sh", "-c", f"{shlex.quote(str(python))} -m {here}"], tmp_path, wheels)
    assert wheelhouse.run([python.parent / "lightbus", "--version"], tmp_path, wheels) == f"lightbus {VERSION}\n"


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with Lightbus' wheel and its extra `template`."""
    folder = tmp_path_factory.mktemp("installed")
    python = wheelhouse.empty_environment(folder / "venv")
    wheelhouse.run([python, "-m", "pip", "install", f"{built[0]}[template]"], folder, wheels)
    return python


def shell(command: str, python: Path, folder: Path, wheels: Path, **more: str) -> str:
    """Run a command where an environment is activated."""
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    return wheelhouse.run(["sh", "-ec", command], folder, wheels, PATH=path, HOME=str(folder), **more)


def test_the_commands_that_new_prints_work(installed: Path, wheels: Path, tmp_path: Path) -> None:
    printed = shell("lightbus new shop --no-input", installed, tmp_path, wheels)
    commands = [line.strip() for line in printed.splitlines() if line.startswith("  ")]
    assert commands == ["cd shop", "pip install --requirement requirements-dev.txt", "make check"]
    assert "5 passed, 1 skipped" in shell("; ".join(commands), installed, tmp_path, wheels)


def commands_of(readme: str, heading: str) -> list[str]:
    section = re.search(rf"^#+ {heading}$(.*?)(?=^#)", readme, re.DOTALL | re.MULTILINE)
    assert section is not None
    return re.findall(r"^\$ (.*)$", section[1], re.MULTILINE)


def test_a_service_is_set_up_as_its_readme_says_and_locks_the_same_versions(
    installed: Path, built: tuple[Path, Path], wheels: Path, tmp_path: Path
) -> None:
    shell("lightbus new shop --no-input", installed, tmp_path, wheels)
    service = tmp_path / "shop"
    readme = (service / "README.md").read_text()
    makes, activates, packs, *others = commands_of(readme, "Develop")
    assert (makes, activates) == ("python3 -m venv .venv", ". .venv/bin/activate")
    assert packs == "pip wheel --no-deps --wheel-dir wheels ~/lightbus"
    (service / "wheels").mkdir()
    shutil.copy(built[0], service / "wheels")  # as the README says for a wheel that exists already
    python = wheelhouse.empty_environment(service / ".venv")
    assert "5 passed, 1 skipped" in shell("; ".join(others), python, service, wheels)

    locks = {name: (service / name).read_text() for name in ("requirements.txt", "requirements-dev.txt")}
    assert commands_of(readme, "Dependencies") == ["make lock", *others]
    shell("make lock", python, service, wheels)
    for name, before in locks.items():
        after = (service / name).read_text().splitlines()
        assert set(after) <= set(before.splitlines()), f"{name} of the template is out of date: run `make lock`"
        # The oldest supported Python needs all of them.
        assert sys.version_info >= (3, 12) or after == before.splitlines()
    assert not (service / ".lock").exists()

    shell("git init --quiet . && git add .", python, service, wheels)
    kept = shell("git ls-files", python, service, wheels).splitlines()
    assert {"requirements.txt", "Dockerfile", "Makefile"} <= set(kept)
    assert not [name for name in kept if name.endswith(".whl") or name.startswith((".venv", "wheels"))]


def test_what_the_dockerfile_does_makes_a_worker(
    installed: Path, built: tuple[Path, Path], wheels: Path, tmp_path: Path
) -> None:
    """Its instructions, one by one, with folders of the test in the place of the image's."""
    shell("lightbus new shop --no-input", installed, tmp_path, wheels)
    service, image = tmp_path / "shop", tmp_path / "image"
    (service / "wheels").mkdir()
    shutil.copy(built[0], service / "wheels")
    text = (service / "Dockerfile").read_text().replace("\\\n", " ")
    image.mkdir()
    here, variables, command = image, {}, []
    for line in text.splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "WORKDIR":
            here = image / rest.removeprefix("/")
            here.mkdir(parents=True)
        elif instruction == "COPY" and not rest.startswith("--from"):
            source, place = rest.split()
            if (service / source).is_dir():
                shutil.copytree(service / source, here / place)
            else:
                shutil.copy(service / source, here / place)
        elif instruction == "RUN" and not rest.startswith("useradd"):
            shell(rest.replace("/venv", f"{image}/venv"), Path(sys.executable), here, wheels)
        elif instruction == "ENV":
            variables = dict(one.split("=") for one in shlex.split(rest))
        elif instruction == "CMD":
            command = json.loads(rest)
    assert sorted(path.name for path in here.iterdir()) == ["shop"], "the image has the package, and no tests"
    python = image / "venv" / "bin" / "python"
    assert "lightbus" not in shell("pip list --format=freeze", python, here, wheels).replace("lightbus-amqp==", "")
    variables.pop("PATH")
    env = wheelhouse.environment(wheels) | variables | {"HOME": str(tmp_path)}

    refused = subprocess.run(
        [python.parent / command[0], *command[1:]], cwd=here, env=env, capture_output=True, text=True, timeout=LIMIT
    )
    assert refused.returncode != 0
    assert "LIGHTBUS_URL is not set" in refused.stderr
    assert not list(tmp_path.rglob("bus.db"))


def test_livez_is_the_health_of_the_container_while_the_broker_is_down(
    installed: Path, wheels: Path, tmp_path: Path
) -> None:
    shell("lightbus new shop --no-input", installed, tmp_path, wheels)
    text = (tmp_path / "shop" / "Dockerfile").read_text().replace("\\\n", " ")
    health, command = (json.loads(found) for found in re.findall(r"^(?:HEALTHCHECK .*?)?CMD (.*)$", text, re.MULTILINE))
    port = str(free_port())
    program = [str(installed.parent / command[0])]
    arguments = [one.replace("8080", port) for one in command[1:]]
    secret = {"LIGHTBUS_REQUIRE_URL": "1", "PYTHONPATH": ""}
    with Program(
        *arguments, folder=tmp_path / "shop", url="amqp://shop:s3cr3t@127.0.0.1:1/", extra=secret, program=program
    ) as worker:
        worker.wait_for("127.0.0.1:1")
        checks = [str(installed), "-c", health[2].replace("8080", port)]

        def healthy(path: str) -> bool:
            asked = [*checks[:2], checks[2].replace("/livez", path)]
            return subprocess.run(asked, stderr=subprocess.DEVNULL, timeout=LIMIT, check=False).returncode == 0

        wait_until(lambda: healthy("/livez"), "an answer of /livez")
        assert not healthy("/readyz")
        assert worker.end(signal.SIGTERM) == 0
    assert "s3cr3t" not in worker.output
