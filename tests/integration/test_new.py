"""`lightbus new`: the created service passes its tests and checks, and the commands of its README work."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import click.testing
import packaging.requirements
import packaging.utils
import pytest
import yaml

from lightbus import __version__
from lightbus.catalog import storage
from lightbus.cli import main, new
from lightbus.cli.dead.reading import NONE
from lightbus.connection.dial import BrokerAddresses
from lightbus.wire import topology
from tests import rabbitmq as nodes
from tests.processes import LIGHTBUS, LIMIT, ROOT, Program, environment, lightbus, wait_until
from tests.wheelhouse import requirements_of

TEMPLATE = ROOT / "cookiecutter"
PAGE = (ROOT / "docs" / "howto" / "new-service.md").read_text()
NOBODY = "amqp://guest:guest@127.0.0.1:1/"
"""The URL of a broker that does not exist."""


@attrs.frozen
class Answers:
    """Answers, and the names that follow from them."""

    name: str
    slug: str
    event: str = "invoice.paid"
    consumes: str = "user.registered"
    handler: str = "on_user_registered"

    @property
    def module(self) -> str:
        return self.slug.replace("-", "_")


PLAIN = Answers("billing", "billing")
OTHERS = [
    Answers("Order Intake", "order-intake", "order.placed", "cart.checked.out", "on_cart_checked_out"),
    Answers("Größe & Maß", "grosse-mass", "size.taken", "b.c", "on_b_c"),
    Answers('--Zoo__\'s "best" \\ 🦒 <b>', "zoo-s-best-b", "giraffe-2.fed_late", "import", "on_import"),
    Answers(f"a{'-long' * 7}-end", f"a{'-long' * 7}-end", f"{'e' * 36}.out", f"{'h' * 36}.out", f"on_{'h' * 36}_out"),
]


def run(*arguments: str, given: str = "") -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["new", *arguments], input=given)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


class Service:
    """A service created from the template. Runs commands of its README."""

    def __init__(self, folder: Path, answers: Answers) -> None:
        self.folder = folder
        self.answers = answers
        self.readme = (folder / "README.md").read_text()

    def words(self, command: str) -> list[str]:
        assert f"$ {command}\n" in self.readme
        return shlex.split(command.partition(" | ")[0])

    def do(self, command: str, url: str = NOBODY, extra: Mapping[str, str] | None = None) -> str:
        """Run a command of the README."""
        program, *arguments = self.words(command)
        more = {"LIGHTBUS_URL": url, "PYTEST_ADDOPTS": "-p no:asyncio -p no:cacheprovider", **(extra or {})}
        done = subprocess.run(
            [program, *arguments, f"PYTHON={sys.executable}"]
            if program == "make"
            else [sys.executable, "-m", program, *arguments],
            cwd=self.folder,
            env=environment(more),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def worker(self, url: str) -> Program:
        """Start the worker of the README, and wait until it is ready."""
        _, *arguments = self.words(f"lightbus worker {self.answers.module}.bus:app")
        worker = Program(*arguments, folder=self.folder, url=url)
        worker.wait_for("Ready")
        return worker


def make(answers: Answers, *more: str) -> Service:
    done = run("--name", answers.name, "--event", answers.event, "--consumes", answers.consumes, "--no-input", *more)
    assert done.exit_code == 0, done.output
    return Service(Path.cwd() / answers.slug, answers)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/bus.db"


@pytest.fixture(scope="module")
def mypy_cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of mypy for all services, which saves several seconds for each check."""
    return {"MYPY_CACHE_DIR": str(tmp_path_factory.mktemp("mypy"))}


# --- the created service ----------------------------------------------------------------------------


@pytest.mark.parametrize("answers", [PLAIN, *OTHERS], ids=lambda one: one.slug)
def test_the_commands_in_the_readme_of_a_service_work(answers: Answers, url: str, mypy_cache: dict[str, str]) -> None:
    service = make(answers)
    made = files(service.folder)
    checked = service.do("make check", extra=mypy_cache)
    assert "All checks passed!\n" in checked
    assert "9 files already formatted\n" in checked
    assert "Success: no issues found in 8 source files\n" in checked
    assert "5 passed, 1 skipped in" in checked
    with service.worker(url) as worker:
        service.do(f"lightbus publish tests.elsewhere:app {answers.consumes} id=1", url)
        worker.wait_for(f"INFO .* {answers.module}.bus: handled {re.escape(answers.consumes)} 1$")
        assert worker.end(signal.SIGTERM) == 0
    assert answers.handler in worker.output
    assert service.do(f"lightbus dead list {answers.module}.bus:app", url) == f"{NONE}\n"
    left = {name for name in files(service.folder) - made if "__pycache__" not in name}
    assert {Path(name).parts[0] for name in left} <= {".ruff_cache"}
    assert not [path for path in made if "{{" in path or "{{ cookie" in (service.folder / path).read_text()]


@pytest.fixture(params=["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def either(request: pytest.FixtureRequest) -> str:
    """The URL of an embedded broker, or of RabbitMQ."""
    found: str = request.getfixturevalue("url" if request.param == "sqlite" else "rabbitmq_url")
    return found


def test_two_services_exchange_events_as_the_page_shows(either: str) -> None:
    shop = make(Answers("shop", "shop", "order.placed", "cart.submitted"))
    assert "`lightbus new billing --event invoice.paid --consumes order.placed --no-input`" in PAGE
    assert run("billing", "--event", "invoice.paid", "--consumes", "order.placed", "--no-input").exit_code == 0
    billing = Service(Path("billing").resolve(), PLAIN)
    with shop.worker(either) as selling, billing.worker(either) as charging:
        for service in (shop, billing):
            assert f"$ lightbus worker {service.answers.module}.bus:app\n" in PAGE
        command = "lightbus publish tests.elsewhere:app cart.submitted id=1"
        assert f"$ {command}\n" in PAGE
        shop.do(command, either)
        for worker in (selling, charging):
            line = worker.wait_for("INFO .* handled .*")[0]
            assert f"{line}\n" in PAGE
            assert worker.end(signal.SIGTERM) == 0


def test_settings_come_from_the_environment(url: str) -> None:
    service = make(PLAIN)
    with Program(
        "worker", "billing.bus:app", folder=service.folder, url=url, extra={"BILLING_CONCURRENCY": "7"}
    ) as worker:
        worker.wait_for("concurrency 7")
    done = lightbus("worker", "billing.bus:app", folder=service.folder, url=url, extra={"BILLING_CONCURRENCY": "x"})
    assert done.returncode == 2
    reason, last = done.stderr.splitlines()[-2:]
    assert reason == "ValueError: BILLING_CONCURRENCY='x': use a whole number, such as 32."
    assert last == "Error: module 'billing.bus' cannot be imported: see above."
    assert "| `BILLING_CONCURRENCY` | 32 |" in service.readme


def test_the_containers_command_stops_on_sigterm(url: str) -> None:
    dockerfile = (make(PLAIN).folder / "Dockerfile").read_text()
    *before, command = re.findall(r"^CMD (.*)$", dockerfile, re.MULTILINE)
    assert not before
    assert "\nUSER 1000\n" in dockerfile
    program, *arguments = json.loads(command)
    assert program == "lightbus"
    arguments[arguments.index("8080")] = "0"
    with Program(*arguments, folder=Path("billing").resolve(), url=url) as worker:
        worker.wait_for("Ready")
        assert worker.end(signal.SIGTERM) == 0


def parsed(path: str) -> Any:
    return yaml.safe_load(Path("billing", path).read_text())


def test_ci_and_pre_commit_run_the_commands_of_the_readme() -> None:
    service = make(PLAIN)
    workflow = parsed(".github/workflows/ci.yml")
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    get, *commands, last = [step["run"] for step in job["steps"] if "run" in step]
    for command in commands:
        assert f"$ {command}\n" in service.readme
    assert commands[-1] == "make check"
    assert last == "docker build ."
    # The wheel is not in git. If the variable is not set, the error names the next step.
    (variables,) = [step["env"] for step in job["steps"] if step.get("run") == get]
    assert variables == {"LIGHTBUS": "${{ vars.LIGHTBUS }}"}
    assert "Set the repository variable `LIGHTBUS`" in service.readme
    done = subprocess.run(
        ["bash", "-ec", get],
        env=environment({"LIGHTBUS": ""}),
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode != 0
    assert "Set the repository variable LIGHTBUS, see README.md." in done.stderr
    (repository,) = parsed(".pre-commit-config.yaml")["repos"]
    hooks = [hook["entry"].split()[:2] for hook in repository["hooks"]]
    assert hooks == [["ruff", "check"], ["ruff", "format"], ["mypy"]]
    for name, version in locked(service, "requirements-dev.txt").items():
        assert importlib.metadata.version(name) == version, "the version that these tests use"


def locked(service: Service, name: str) -> dict[str, str]:
    """The distributions of a lock file, and their versions."""
    lines = (service.folder / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_image_installs_dependencies_before_the_source_and_checks_livez() -> None:
    service = make(PLAIN)
    dockerfile = (service.folder / "Dockerfile").read_text()
    steps = [dockerfile.index(step) for step in ("COPY requirements.txt", "pip install", "COPY billing billing")]
    assert steps == sorted(steps)
    assert "COPY . ." not in dockerfile
    assert re.search(r"^ENV .*\bLIGHTBUS_REQUIRE_URL=1$", dockerfile, re.MULTILINE)
    (health,) = re.findall(r"^HEALTHCHECK .*\\\n +CMD (.*)$", dockerfile, re.MULTILINE)
    assert "http://127.0.0.1:8080/livez" in health
    runtime, development = (locked(service, name) for name in ("requirements.txt", "requirements-dev.txt"))
    assert runtime.items() <= development.items()
    assert runtime["lightbus-amqp"] == __version__
    assert {"mypy", "pytest", "ruff"} <= development.keys() - runtime.keys()
    # `pip install --no-deps` installs no others, so all that the image's Python needs must be there.
    (python,) = set(re.findall(r"^FROM python:(3\.\d+)-slim", dockerfile, re.MULTILINE))
    image = {"extra": "", "python_version": python, "python_full_version": f"{python}.0"}
    requirements = [
        packaging.requirements.Requirement(one) for name in runtime for one in importlib.metadata.requires(name) or []
    ]
    needed = {one.name for one in requirements if one.marker is None or one.marker.evaluate(image)}
    canonical = packaging.utils.canonicalize_name
    assert {*map(canonical, needed)} <= {*map(canonical, runtime)}
    assert "wheels" not in (service.folder / ".dockerignore").read_text()


@pytest.mark.rabbitmq
def test_in_ci_the_tests_of_a_service_use_rabbitmq(rabbitmq_url: str) -> None:
    service = make(PLAIN)
    (job,) = parsed(".github/workflows/ci.yml")["jobs"].values()
    broker = job["services"]["rabbitmq"]
    assert broker["image"] == "rabbitmq:4"
    assert "--health-cmd" in broker["options"]
    (variables,) = [step["env"] for step in job["steps"] if step.get("run") == "make check"]
    assert variables == {"TEST_RABBITMQ_URL": "amqp://guest:guest@localhost:5672/"}
    assert broker["ports"] == ["5672:5672"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:asyncio", "tests/test_rabbitmq.py"],
        cwd=service.folder,
        env=environment({"TEST_RABBITMQ_URL": rabbitmq_url}),
        capture_output=True,
        text=True,
        timeout=4 * LIMIT,
        check=False,
    )
    assert "1 passed in" in done.stdout, done.stdout + done.stderr


def test_compose_waits_for_the_broker_and_gives_the_worker_time_to_stop() -> None:
    make(PLAIN)
    services = parsed("compose.yaml")["services"]
    assert services["worker"]["depends_on"] == {"rabbitmq": {"condition": "service_healthy"}}
    assert services["worker"]["environment"] == {"LIGHTBUS_URL": "amqp://billing:billing@rabbitmq:5672/"}
    assert services["worker"]["stop_grace_period"] == "60s"
    assert all(port.startswith("127.0.0.1:") for port in services["rabbitmq"]["ports"])
    for volume in services["rabbitmq"]["volumes"]:
        source = volume.partition(":")[0]
        assert source == "rabbitmq" or Path("billing", source).is_file()


def test_the_definitions_have_the_bus_and_minimal_permissions() -> None:
    service = make(OTHERS[0])
    slug = service.answers.slug
    definitions = json.loads((service.folder / "deploy" / "rabbitmq" / "definitions.json").read_text())
    done = lightbus(
        "topology", "permissions", f"{service.answers.module}.bus:app", "--json", folder=service.folder, url=NOBODY
    )
    assert definitions["permissions"] == [json.loads(done.stdout) | {"vhost": "/"}]
    assert [user["name"] for user in definitions["users"]] == [slug]
    (bus,) = definitions["exchanges"]
    wanted = topology.bus_exchange()
    assert (bus["name"], bus["type"], bus["internal"]) == (wanted.name, wanted.type, wanted.internal)
    assert (bus["durable"], bus["auto_delete"], bus["arguments"]) == (True, False, wanted.arguments)
    (stream,) = definitions["queues"]
    catalog = topology.catalog_stream()
    assert (stream["name"], stream["arguments"]) == (catalog.name, catalog.arguments)
    assert (stream["durable"], stream["auto_delete"]) == (True, False)


@pytest.mark.rabbitmq
def test_a_service_works_on_rabbitmq_with_these_definitions(rabbitmq_node: Callable[..., nodes.Node]) -> None:
    service = make(PLAIN)
    node = rabbitmq_node(f"load_definitions = {service.folder}/deploy/rabbitmq/definitions.json\n")
    assert node.ctl("list_users", "--no-table-headers").split() == ["billing", "[management]"]
    (healthy,) = [parsed("compose.yaml")["services"]["rabbitmq"]["healthcheck"]["test"]]
    diagnostics = nodes.find(healthy[1])
    assert diagnostics is not None
    command = [diagnostics, "--node", node.name, *healthy[2:]]
    assert subprocess.run(command, env=node.environment, timeout=2 * LIMIT, check=False).returncode == 0

    node.ctl("add_user", "elsewhere", "elsewhere")
    line = service.do("lightbus topology permissions tests.elsewhere:app | docker compose exec --no-TTY rabbitmq sh")
    node.ctl(*shlex.split(line)[1:])
    url, elsewhere = node.vhost_url("", "billing", "billing"), node.vhost_url("", "elsewhere", "elsewhere")
    with service.worker(url) as worker:
        assert service.do("lightbus doctor billing.bus:app", url).endswith("No problems found.\n")
        service.do("lightbus publish tests.elsewhere:app user.registered id=1", elsewhere)
        worker.wait_for("handled user.registered 1")
        wait_until(
            lambda: [one.app for one in storage.read(BrokerAddresses.parse(url)).contracts] == ["billing"],
            "the contract of the worker",
        )
        assert worker.end(signal.SIGTERM) == 0
    refused = lightbus("publish", "tests.elsewhere:app", "user.registered", "id=1", folder=service.folder, url=url)
    assert refused.returncode == 1
    assert "elsewhere" in refused.stderr


def test_systemd_can_read_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed, so nothing is known of the unit")
    unit = (make(OTHERS[0]).folder / "deploy" / "order-intake.service").read_text()
    path = tmp_path / "order-intake.service"
    path.write_text(unit.replace("/srv/order-intake/.venv/bin/lightbus", sys.executable))  # it must exist
    done = subprocess.run([analyze, "verify", path], capture_output=True, text=True, timeout=LIMIT, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


# --- cookiecutter and the wheel ----------------------------------------------------------------------


def test_cookiecutter_creates_the_same_files(here: Path) -> None:
    make(PLAIN)
    command = [sys.executable, "-m", "cookiecutter", str(TEMPLATE), "--no-input", "--default-config", "-o", "alone"]
    env = environment({"HOME": str(here.parent)})
    subprocess.run(command, env=env, check=True, timeout=2 * LIMIT)
    assert files(here / "alone" / "billing") == files(here / "billing")
    for name in files(here / "billing"):
        assert (here / "alone" / "billing" / name).read_text() == (here / "billing" / name).read_text()


def test_cookiecutter_rejects_an_invalid_name_and_leaves_nothing(here: Path) -> None:
    command = [sys.executable, "-m", "cookiecutter", str(TEMPLATE), "--no-input", "--default-config", "name=class"]
    env = environment({"HOME": str(here.parent)})
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=2 * LIMIT, check=False)
    assert done.returncode != 0
    assert "Error: the name 'class' is a keyword of Python." in done.stderr
    assert not list(here.iterdir())


def test_the_wheel_has_the_template_and_a_service_can_be_installed(tmp_path: Path, url: str) -> None:
    """Without a clone: only with the wheel and pip."""
    site, wheels, elsewhere = tmp_path / "site", tmp_path / "wheels", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", wheels, ROOT], check=True, timeout=4 * LIMIT)
    (wheel,) = wheels.glob("lightbus_amqp-*.whl")
    packed = {name.removeprefix("lightbus/_template/") for name in zipfile.ZipFile(wheel).namelist()}
    assert packed >= files(TEMPLATE)

    subprocess.run([*pip, "install", *offline, "--target", site, wheel], check=True, timeout=4 * LIMIT)
    env = environment({"PYTHONPATH": str(site), "LIGHTBUS_URL": url})
    command = [*LIGHTBUS, "new", "billing", "--no-input"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL, timeout=2 * LIMIT)
    make(PLAIN)
    assert files(tmp_path / "billing") == files(Path("billing"))

    # pip finds "lightbus-amqp" among the installed packages.
    subprocess.run([*pip, "install", *offline, "--target", site, tmp_path / "billing"], check=True, timeout=4 * LIMIT)
    with Program("worker", "billing.bus:app", folder=elsewhere, url=url, extra={"PYTHONPATH": str(site)}) as worker:
        worker.wait_for("Ready")
        assert worker.end(signal.SIGTERM) == 0


def test_without_cookiecutter_it_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cookiecutter", "cookiecutter.main"):
        monkeypatch.setitem(sys.modules, module, None)
    done = run("billing", "--no-input")
    assert done.exit_code == 1
    assert "pip install cookiecutter" in done.output


# --- the questions ----------------------------------------------------------------------------


def test_the_page_shows_the_questions_and_the_output() -> None:
    done = run(given="shop\norder.placed\ncart.submitted\n")
    assert done.exit_code == 0
    assert f"$ lightbus new\n{done.output}```" in PAGE
    assert files(Path("shop"))


def test_without_an_answer_it_names_the_option_that_skips_the_questions() -> None:
    done = run("--name", "shop", given="")
    assert done.exit_code == 1
    assert done.stderr.endswith("\nError: stdin ended without an answer. To skip the question: --no-input\n")
    assert not Path("shop").exists()


def test_an_invalid_answer_is_asked_for_again() -> None:
    done = run(given="class\nbilling\nInvoicePaid\ninvoice.paid\ninvoice.paid\nuser.registered\n")
    assert done.exit_code == 0, done.output
    assert "such as 'class-service'" in done.output
    assert "as in 'invoice.paid'" in done.output
    assert "Choose an event of another service" in done.output
    assert Path("billing", "billing", "bus.py").exists()


def test_ctrl_c_leaves_nothing_behind(here: Path) -> None:
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [*LIGHTBUS, "new"], cwd=here, env=environment(), stdin=end, stdout=end, stderr=end, start_new_session=True
    )
    os.close(end)
    try:
        shown = b""
        os.write(terminal, b"billing\n")
        while b"does it publish" not in shown:
            shown += os.read(terminal, 1000)

        def pressed() -> bool:
            # Repeated after a second: a signal directly before Python reads is handled only after the answer.
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            return process.returncode is not None

        wait_until(pressed, "the end, after Ctrl-C")
        assert process.returncode == 130
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    assert not list(here.iterdir())


@pytest.mark.parametrize("folder", ["billing", "."])
def test_ctrl_c_while_rendering_leaves_nothing_behind(folder: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, output_dir: str, **__: Any) -> None:
        Path(output_dir, "half").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("cookiecutter.main.cookiecutter", interrupted)
    assert run(folder, "--name", "billing", "--no-input").exit_code == 130
    assert not list(here.iterdir())


def test_the_folder_sets_the_name_and_the_place() -> None:
    assert run("some/place/order_intake", "--no-input").exit_code == 0
    assert 'Lightbus("order-intake"' in Path("some/place/order_intake/order_intake/bus.py").read_text()
    assert run("elsewhere-on-disk", "--name", "billing", "--no-input").exit_code == 0
    assert Path("elsewhere-on-disk/billing/bus.py").exists()


def test_an_empty_folder_can_be_used_even_the_current_one(here: Path) -> None:
    place = here.stat().st_ino
    done = run(".", "--name", "billing", "--no-input")
    assert done.exit_code == 0, done.output
    assert (here / "billing" / "bus.py").exists()
    assert here.stat().st_ino == place
    assert "cd " not in done.output


@pytest.mark.parametrize("folder", [["billing"], []], ids=["named", "from the name"])
def test_a_folder_that_is_not_empty_is_refused(folder: list[str]) -> None:
    Path("billing").mkdir()
    Path("billing", "mine.txt").write_text("mine")
    done = run(*folder, "--no-input")
    assert done.exit_code == 2
    assert "billing is not empty. Use a folder that does not exist yet." in done.output
    assert files(Path.cwd()) == {"billing/mine.txt"}


# --- invalid names ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "the name '' has no letters. Use some, as in 'billing'."),
        ("🚀", "the name '🚀' has no letters."),
        ("3D printing", "'3D printing' becomes '3d-printing', which does not begin with a letter."),
        ("class", "the name 'class' is a keyword of Python. Choose another one, such as 'class-service'."),
        ("Async", "becomes 'async', which is a keyword of Python."),
        ("AMQ", "the name 'AMQ' becomes 'amq', which is reserved by RabbitMQ."),
        ("lightbus", "the name 'lightbus' would hide a module or folder of the same name."),
        ("test", "such as 'test-service'"),
        ("Tests", "such as 'tests-service'"),
        ("email", "the name 'email' would hide a module"),
        ("Concurrent", "would hide"),
        ("typing extensions", "would hide"),
        ("msgspec", "would hide"),
        ("deploy", "would hide"),
        ("x" * 41, "has 41 characters. The maximum is 40"),
        ("two\nlines", "has characters that cannot be printed"),
        ("{{ billing }}", "has a brace"),
    ],
)
def test_an_invalid_name_is_refused(name: str, expected: str, here: Path) -> None:
    done = run("--name", name, "--no-input")
    assert done.exit_code == 2
    assert expected in done.output
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ("", "'' is not a valid name for an event. Use lower-case words separated by dots"),
        ("InvoicePaid", "as in 'invoice.paid'."),
        ("Invoice Paid", "as in 'invoice.paid'."),
        ("rechnung.bezahlt.für", "as in 'invoice.paid'."),
        ("3d.printed", "beginning with a letter, as in 'd.printed'."),
        ("invoice.*", "You can use wildcards in bus.py later."),
        ("invoice..paid", "as in 'invoice.paid'."),
        ("none", "needs a class None, but bus.py uses this name already. Choose a longer one, such as 'none.changed'."),
        ("value-error", "needs a class ValueError"),
        ("lightbus", "needs a class Lightbus"),
        ("x" * 41, "has 41 characters. The maximum is 40"),
    ],
)
def test_an_invalid_event_is_refused(event: str, expected: str, here: Path) -> None:
    for option, other in (("--event", "--consumes"), ("--consumes", "--event")):
        done = run("billing", option, event, other, "another.event", "--no-input")
        assert done.exit_code == 2
        assert expected in done.output
        assert not list(here.iterdir())


def test_the_published_and_the_consumed_event_must_differ(here: Path) -> None:
    done = run("billing", "--event", "user.registered", "--consumes", "user-registered", "--no-input")
    assert done.exit_code == 2
    assert "Choose an event of another service for it to consume." in done.output
    assert not list(here.iterdir())


def test_no_service_has_the_name_of_a_package_that_it_needs() -> None:
    distributions = {
        *requirements_of("lightbus-amqp", {"template", "reload", "trio", "uvloop"}),
        *(one for tool in ("pytest", "ruff", "mypy", "hatchling") for one in requirements_of(tool)),
    }
    modules = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if {packaging.utils.canonicalize_name(owner) for owner in owners} & distributions
    }
    assert {"kombu", "pytest", "yaml"} <= modules
    rules = new.template_rules()
    allowed = []
    for name in sorted(distributions | {module for module in modules if not module.startswith("_")}):
        slug = name.replace("_", "-").lower()
        with contextlib.suppress(ValueError):
            rules.check_name(slug, slug)
            allowed.append(name)
    assert not allowed, "add them to TAKEN, in cookiecutter/hooks/pre_gen_project.py"
