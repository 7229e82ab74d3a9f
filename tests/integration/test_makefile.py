"""Make never changes an environment that the README made, and has its own. The servers that it installs do not run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import wheelhouse
from tests.patience import LIMIT
from tests.processes import ROOT

README = (ROOT / "README.md").read_text()
FILES = ("Makefile", "pyproject.toml", "README.md", "LICENSE", "lightbus", "cookiecutter", "docs/examples")
TOOLS = ("editables", "hatchling", "pytest")
"""What stands for requirements-dev.txt here: enough for an editable install, and for `make test ARGS=--version`."""
TESTS = ("make", "-o", "servers", f"PYTHONS={sys.executable}", "test", "ARGS=--version")
DEMO = ("make", "demo", "ARGS=--events 100")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What PyPI has: Lightbus' requirements, and the tools."""
    folder = tmp_path_factory.mktemp("wheelhouse")
    names = {name for one in ("lightbus-amqp", *TOOLS) for name in wheelhouse.requirements_of(one)}
    wheelhouse.fill(folder, names - {"lightbus-amqp"})
    return folder


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "clone"
    for name in FILES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "requirements-dev.txt").write_text("\n".join(TOOLS))
    return folder


def install_as_the_readme_says(clone: Path, wheels: Path) -> None:
    section = re.search(r"start the worker.*?```console\n(.*?)```", README, re.DOTALL)
    assert section is not None
    commands = re.findall(r"^\$ (.*)$", section[1], re.MULTILINE)
    assert commands[:3] == ["python3 -m venv .venv", ". .venv/bin/activate", "pip install ."]
    script = "; ".join(commands[:3]).replace("python3", sys.executable)
    wheelhouse.run(["sh", "-ec", script], clone, wheels)


def installed(environment: Path, clone: Path, wheels: Path) -> str:
    """Every distribution with its version and its origin."""
    return wheelhouse.run([environment / "bin" / "python", "-m", "pip", "freeze", "--all"], clone, wheels)


def test_make_leaves_the_environment_of_the_readme_as_it_was(clone: Path, wheels: Path) -> None:
    install_as_the_readme_says(clone, wheels)
    before = installed(clone / ".venv", clone, wheels)
    assert f"lightbus-amqp @ file://{clone}\n" in before
    assert "All events were handled as expected" in wheelhouse.run(DEMO, clone, wheels)
    assert not (clone / ".make").exists(), "the demo runs in the environment of the README"
    assert "pytest " in wheelhouse.run(TESTS, clone, wheels)
    assert "Editable" in installed(clone / ".make" / "venv", clone, wheels)
    assert installed(clone / ".venv", clone, wheels) == before


def test_make_leaves_its_own_environment_as_the_readme_changed_it(clone: Path, wheels: Path) -> None:
    assert "Setting up .venv " in wheelhouse.run(TESTS, clone, wheels)
    assert "Editable" in installed(clone / ".venv", clone, wheels)
    assert "Setting up" not in wheelhouse.run(TESTS, clone, wheels)
    install_as_the_readme_says(clone, wheels)
    before = installed(clone / ".venv", clone, wheels)
    assert "pytest " in wheelhouse.run(TESTS, clone, wheels)
    assert installed(clone / ".venv", clone, wheels) == before


def test_an_interrupted_setup_is_done_again(clone: Path, wheels: Path) -> None:
    """Ctrl-C during the first set-up leaves an environment without its stamp."""
    (clone / ".venv").mkdir()
    (clone / ".venv" / "made-by-make").touch()
    assert "Setting up .venv " in wheelhouse.run(TESTS, clone, wheels)
    assert not (clone / ".make").exists()


APT_GET = """\
#!/bin/sh
for package in rabbitmq-server postgresql mariadb-server prometheus; do
  case "$*" in *"install"*" $package") echo "$package; $(cat policy-rc.d d/cluster.conf 2>/dev/null)";; esac
done >> installed
"""
"""Writes the package's name, and the files that exist during the installation."""


@pytest.mark.parametrize("policy", ["", "of this machine"])
def test_servers_are_installed_without_a_service_and_a_cluster(tmp_path: Path, policy: str) -> None:
    installed = install_servers(tmp_path, present=("amqp-publish",), policy=policy)
    rule = policy or "#!/bin/sh\nexit 101"
    packages = ("rabbitmq-server", "postgresql", "mariadb-server", "prometheus")
    assert installed == "".join(f"{package}; {rule}\ncreate_main_cluster = false\n" for package in packages)
    left = {path.name for path in tmp_path.iterdir()} - {"bin", "installed"}
    assert left == ({"policy-rc.d"} if policy else set())


def test_only_a_missing_server_is_installed(tmp_path: Path) -> None:
    installed = install_servers(tmp_path, present=("amqp-publish", "postgres", "mariadbd", "prometheus"))
    assert installed == "rabbitmq-server; #!/bin/sh\nexit 101\n"


def install_servers(folder: Path, present: tuple[str, ...], policy: str = "") -> str:
    """Run `make servers` as if by root, on a machine with these programs only; returns what `apt-get` wrote."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("cat", "chmod", "ls", "mkdir", "mktemp", "rm", "rmdir", "tail"):
        (programs / name).symlink_to(shutil.which(name) or "")
    for name, script in {
        "apt-get": APT_GET,
        "id": "#!/bin/sh\necho 0\n",
        **dict.fromkeys(present, "#!/bin/sh\n"),
    }.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    if policy:
        (folder / "policy-rc.d").write_text(policy + "\n")
    nowhere = folder / "nowhere"
    command = [
        *(shutil.which("make") or "", "-f", ROOT / "Makefile", "servers"),
        *("POLICY=policy-rc.d", "NO_CLUSTER=d/cluster.conf", f"POSTGRES_OF_DEBIAN={nowhere}"),
        *(f"{server}_FOLDERS={nowhere}" for server in ("POSTGRES", "RABBITMQ", "MARIADB", "PROMETHEUS")),
    ]
    subprocess.run(command, cwd=folder, env={"PATH": str(programs)}, check=True, capture_output=True, timeout=LIMIT)
    written = folder / "installed"
    return written.read_text() if written.exists() else ""
