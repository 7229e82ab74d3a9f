"""Installing Lightbus: `python -m build` makes a wheel and an sdist, and each works in an empty environment."""

from __future__ import annotations

import re
import shlex
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import lightbus
from tests import wheelhouse
from tests.processes import ROOT

VERSION = lightbus.__version__
PAGE = (ROOT / "docs" / "howto" / "install.md").read_text()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an index would have: Lightbus' requirements, and the tools that build it."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    names = [name for one in wheelhouse.BUILD for name in wheelhouse.requirements_of(one)]
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
    assert "in the file" in output
    # The broker's administrators see this version. It comes from the metadata of the distribution.
    assert f"Lightbus embedded broker {VERSION}" in run(command, "doctor", f"sqlite:///{tmp_path}/bus.db")


def test_the_page_names_the_files_the_version_and_the_extras(built: tuple[Path, Path]) -> None:
    assert f"$ pip install wheels/{built[0].name}\n" in PAGE
    assert f"$ lightbus --version\nlightbus {VERSION}\n" in PAGE
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", PAGE, re.MULTILINE))
    assert rows == {extra: re.split(r"[^\w]", needs)[0] for extra, (needs,) in project["optional-dependencies"].items()}


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
