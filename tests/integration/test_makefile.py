"""Make never changes an environment that the README made, and has its own. The servers that it installs do not run."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests import artemis, wheelhouse
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


MVN = """\
#!/bin/sh
for argument in "$@"; do case $argument in -DoutputDirectory=*) folder=${argument#*=};; esac; done
echo "$*" >> asked
cp download.tar.gz "$folder/apache-artemis-2.40.0-bin.tar.gz"
"""
JAVA = "#!/bin/sh\necho 'openjdk version \"17.0.15\" 2025-04-15' >&2\n"
OLD_JAVA = "#!/bin/sh\necho 'openjdk version \"1.8.0_392\"' >&2\n"


def test_artemis_is_downloaded_once(tmp_path: Path) -> None:
    right = artemis_download(tmp_path)
    done = get_artemis(tmp_path, {"mvn": MVN, "java": JAVA}, right)
    assert done.stdout == f"Downloading ActiveMQ Artemis {artemis.VERSION} to {tmp_path}/cache/lightbus (once) ...\n"
    folder = tmp_path / "cache" / "lightbus"
    assert [path.name for path in folder.iterdir()] == [f"apache-artemis-{artemis.VERSION}"]
    assert (folder / f"apache-artemis-{artemis.VERSION}" / "lib" / "artemis-boot.jar").exists()
    assert get_artemis(tmp_path, {}, right).stdout == ""
    assert len((tmp_path / "asked").read_text().splitlines()) == 1


def test_a_download_of_artemis_with_another_checksum_is_deleted(tmp_path: Path) -> None:
    artemis_download(tmp_path)
    done = get_artemis(tmp_path, {"mvn": MVN, "java": JAVA}, "0" * 128)
    assert "the SHA-512 of the download is not that of the Makefile" in done.stderr
    assert list((tmp_path / "cache" / "lightbus").iterdir()) == []


@pytest.mark.parametrize("programs", [{}, {"mvn": MVN}, {"java": JAVA}, {"mvn": MVN, "java": OLD_JAVA}])
def test_without_maven_and_java_17_artemis_is_skipped(tmp_path: Path, programs: dict[str, str]) -> None:
    done = get_artemis(tmp_path, programs, "")
    assert done.stderr == (
        "Not installed, so the tests on ActiveMQ Artemis will be skipped: Maven, and Java 17 or newer. "
        "On Debian and Ubuntu: sudo apt-get install maven openjdk-17-jre-headless\n"
    )
    assert not (tmp_path / "asked").exists()


def test_a_failed_download_of_artemis_is_shown(tmp_path: Path) -> None:
    done = get_artemis(tmp_path, {"mvn": "#!/bin/sh\necho no network; exit 1\n", "java": JAVA}, "")
    assert done.stderr.splitlines() == [
        "no network",
        "Maven could not download ActiveMQ Artemis, so tests that need it will be skipped.",
    ]


PYTHON = """\
#!/bin/sh
case "$*" in
  *"import proton"*) [ -e built ];;
  *Python.h*) [ -e headers ];;
  *python%d*) echo python3.11-dev;;
  *" pip "*) echo "$*" > built;;
esac
"""
"""Of an environment. `headers` stands for Python's header files."""


def test_the_client_of_artemis_is_built_where_there_is_a_compiler(tmp_path: Path) -> None:
    (tmp_path / "headers").touch()
    done = build_proton(tmp_path, {"cc": "#!/bin/sh\n"})
    assert done.stdout == "Building python-qpid-proton (once, under a minute) ...\n"
    assert "install --requirement requirements-activemq.txt --constraint requirements-dev.txt" in (
        (tmp_path / "built").read_text()
    )
    assert build_proton(tmp_path, {}).stdout == ""


@pytest.mark.parametrize("root", [True, False])
def test_without_a_compiler_root_installs_one(tmp_path: Path, root: bool) -> None:
    done = build_proton(tmp_path, {"apt-get": APT_GET.replace("rabbitmq-server", "python3.11-dev")}, root=root)
    assert (tmp_path / "built").exists() == root
    if root:
        assert "Installing with apt-get, to build python-qpid-proton: gcc libc6-dev python3.11-dev ..." in done.stdout
        assert (tmp_path / "installed").read_text() == "python3.11-dev; \n"
    else:
        assert done.stderr == (
            "Cannot build python-qpid-proton, so the tests on ActiveMQ Artemis will be skipped. "
            "On Debian and Ubuntu: sudo apt-get install gcc libc6-dev python3.11-dev\n"
        )


def artemis_download(folder: Path) -> str:
    """A small Artemis, for the program `MVN`; returns its SHA-512."""
    program = folder / f"apache-artemis-{artemis.VERSION}" / "lib" / "artemis-boot.jar"
    program.parent.mkdir(parents=True)
    program.touch()
    with tarfile.open(folder / "download.tar.gz", "w:gz") as archive:
        archive.add(program.parent.parent, program.parent.parent.name)
    return hashlib.sha512((folder / "download.tar.gz").read_bytes()).hexdigest()


def get_artemis(folder: Path, scripts: dict[str, str], checksum: str) -> subprocess.CompletedProcess[str]:
    return make(folder, scripts, "artemis", f"ARTEMIS_SHA512={checksum}", f"XDG_CACHE_HOME={folder}/cache")


def build_proton(folder: Path, scripts: dict[str, str], *, root: bool = False) -> subprocess.CompletedProcess[str]:
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (folder / "requirements-activemq.txt").touch()
    scripts = {"id": f"#!/bin/sh\necho {0 if root else 1000}\n", **scripts}
    return make(folder, scripts, "proton", "VENV=venv")


def install_servers(folder: Path, present: tuple[str, ...], policy: str = "") -> str:
    """Run `make servers` as if by root, on a machine with these programs only; returns what `apt-get` wrote."""
    if policy:
        (folder / "policy-rc.d").write_text(policy + "\n")
    nowhere = folder / "nowhere"
    make(
        folder,
        {"apt-get": APT_GET, "id": "#!/bin/sh\necho 0\n", **dict.fromkeys(present, "#!/bin/sh\n")},
        *("servers", "-o", "artemis", "-o", "proton"),
        *("POLICY=policy-rc.d", "NO_CLUSTER=d/cluster.conf", f"POSTGRES_OF_DEBIAN={nowhere}"),
        *(f"{server}_FOLDERS={nowhere}" for server in ("POSTGRES", "RABBITMQ", "MARIADB", "PROMETHEUS")),
    )
    written = folder / "installed"
    return written.read_text() if written.exists() else ""


REAL = (
    "cat",
    "chmod",
    "cp",
    "cut",
    "gzip",
    "ls",
    "mkdir",
    "mktemp",
    "mv",
    "rm",
    "rmdir",
    "sed",
    "sha512sum",
    "tail",
    "tar",
)


def make(folder: Path, scripts: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the folder, on a machine with these programs only."""
    programs = folder / "bin"
    shutil.rmtree(programs, ignore_errors=True)
    programs.mkdir()
    for name in REAL:
        (programs / name).symlink_to(shutil.which(name) or "")
    for name, script in scripts.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    command = [shutil.which("make") or "", "-f", str(ROOT / "Makefile"), *arguments]
    return subprocess.run(
        command, cwd=folder, env={"PATH": str(programs)}, check=True, capture_output=True, text=True, timeout=LIMIT
    )
