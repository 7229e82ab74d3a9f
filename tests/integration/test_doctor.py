"""`lightbus doctor` finds each problem, with its next step and an exit code."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from lightbus import Lightbus, Retry, __version__
from lightbus.catalog import storage
from lightbus.catalog.contract import contract_of
from lightbus.connection.address import parse_address
from lightbus.connection.declare import declare
from lightbus.inspection.broker import version as check_version
from lightbus.inspection.trial import clock as check_clock
from lightbus.transport import Delivery, Publication
from lightbus.wire import topology
from tests import rabbitmq as nodes
from tests.bus import connected, publish_plainly
from tests.patience import wait_until
from tests.processes import lightbus, working

BUS = """\
from lightbus import Lightbus, Retry

app = Lightbus("billing", retry=Retry(delays=(5,)))

@app.on("invoice.*")
async def charge(invoice: dict): ...
"""


FILES = {"billing.py": BUS}


Doctor = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def doctor(folder: Path, url: str) -> Doctor:
    def run(*options: str) -> CompletedProcess[str]:
        return lightbus("doctor", "billing:app", *options, folder=folder, url=url)

    return run


def findings(done: CompletedProcess[str], subject: str) -> list[dict[str, Any]]:
    assert done.stdout, done.stderr
    return [one for one in json.loads(done.stdout)["findings"] if one["subject"] == subject]


def declared(url: str) -> Lightbus:
    app = Lightbus("billing", url=url, retry=Retry(delays=(5,)))
    app.on("invoice.*", name="charge")(lambda body: None)
    with connected(url) as connection:
        declare(connection, app.topology())
    return app


def test_no_problems_while_a_worker_runs(folder: Path, url: str, doctor: Doctor) -> None:
    with working("billing:app", folder=folder, url=url) as worker:
        done = doctor("--strict")
        assert (done.returncode, done.stderr) == (0, "")
        assert "No problems found." in done.stdout
        assert "billing.main: 0 events ready, 1 consumer." in done.stdout
        assert "Declaring, binding, publishing, confirms and reading work." in done.stdout
        assert "The clocks of the broker and of this machine agree." in done.stdout
        assert ("rabbitmqctl" in done.stdout) == url.startswith("amqp"), "only RabbitMQ can list bindings"
        worker.end(signal.SIGTERM)


def test_doctor_changes_nothing(url: str, doctor: Doctor) -> None:
    app = declared(url)
    with connected(url) as connection:
        channel = connection.channel()
        declare(connection, topology.publishing("shop"))
        publish_plainly(channel, "shop", "invoice.paid", b"{}")
        wait_until(lambda: channel.queue_declare(f"{app.name}.main", passive=True).message_count == 1, "the event")
        assert doctor().returncode == 1  # no consumer
        for queue in app.topology().queues:
            assert channel.queue_declare(queue.name, passive=True).message_count == (queue.name == "billing.main")


def test_missing_objects_are_listed_with_the_command_that_declares_them(url: str, doctor: Doctor) -> None:
    done = doctor("--json")
    assert done.returncode == 1
    bus, missing = findings(done, "topology")
    assert "bus exchange 'lightbus' does not exist" in bus["text"]
    wanted = "Missing: billing, billing.internal, billing.dead (queue), billing.main (queue), "
    assert missing["text"].startswith(wanted)
    assert missing["next"].endswith("lightbus worker billing:app")


SHOP = 'from lightbus import Lightbus\n\napp = Lightbus("shop")\n'


def test_an_app_without_handlers_needs_no_worker_and_its_publishing_is_tested(tmp_path: Path, url: str) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    with connected(url) as connection:
        declare(connection, topology.publishing("shop"))
        channel = connection.channel()
        channel.queue_declare("all", durable=True, auto_delete=False)
        channel.queue_bind("all", "lightbus", "#")
        done = lightbus("doctor", "shop:app", "--strict", folder=tmp_path, url=url)
        assert channel.queue_declare("all", passive=True).message_count == 0, "the trial message reaches no queue"
    assert (done.returncode, done.stderr) == (0, "")
    assert "'shop' has no handlers, so it needs no queues and no worker." in done.stdout
    assert "Declaring, binding, publishing and confirms work." in done.stdout
    assert "The clocks of the broker and of this machine agree." in done.stdout
    assert "No problems found." in done.stdout


@pytest.mark.rabbitmq
def test_a_missing_publish_permission_is_found_and_the_trial_leaves_nothing(
    tmp_path: Path, rabbitmq: nodes.Node, rabbitmq_url: str
) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    with connected(rabbitmq_url) as connection:
        declare(connection, topology.publishing("shop"))
    vhost = rabbitmq_url.rpartition("/")[2]
    user = f"shop-{vhost}"
    rabbitmq.ctl("add_user", user, "s3cr3t")
    url = rabbitmq.vhost_url(vhost, user, "s3cr3t")
    for write, code in ((r"^shop\..+-out$", 1), (r"^(shop(\..+)?|lightbus)$", 0)):
        rabbitmq.ctl("set_permissions", "-p", vhost, user, r"^shop(\..+)?$", write, r"^(shop(\..+)?|lightbus)$")
        done = lightbus("doctor", "shop:app", "--json", folder=tmp_path, url=url)
        assert done.returncode == code
        (finding,) = findings(done, "permissions")
        assert finding["level"] == ("fail" if code else "ok")
        assert ("lightbus topology permissions shop:app" in (finding["next"] or "")) == bool(code)
    wait_until(lambda: "doctor" not in rabbitmq.ctl("list_exchanges", "-p", vhost, "name"), "the exchange is deleted")


def test_a_queue_with_other_arguments_is_reported_with_the_difference(url: str, doctor: Doctor) -> None:
    declared(url)
    with connected(url) as connection:
        channel = connection.channel()
        channel.queue_delete("billing.retry.5s")
        channel.queue_declare("billing.retry.5s", durable=True, auto_delete=False, arguments={"x-message-ttl": 7000})
    done = doctor("--json")
    assert done.returncode == 1
    (finding,) = findings(done, "topology")
    assert finding["level"] == "fail"
    assert "billing.retry.5s" in finding["text"]
    assert "inequivalent arg" in finding["text"]
    vhost = f"--vhost {url.rpartition('/')[2]} " if url.startswith("amqp") else ""
    if vhost:
        assert f"rabbitmqctl delete_queue {vhost}billing.retry.5s," in finding["next"]
    else:
        file = url.removeprefix("sqlite:///")
        assert f"stop all programs that use {file}, and delete that file (its messages are lost)" in finding["next"]
        assert "rabbitmqctl" not in finding["next"]
    (bindings,) = findings(done, "bindings")
    assert bindings["next"].startswith(f"rabbitmqctl list_bindings {vhost}source_name" if vhost else "lightbus unbind")


def test_an_exchange_of_another_type_is_reported_as_an_exchange(url: str, doctor: Doctor) -> None:
    declared(url)
    with connected(url) as connection:
        channel = connection.channel()
        channel.exchange_delete("billing")
        channel.exchange_declare("billing", "direct", durable=True, auto_delete=False)
    (finding,) = findings(doctor("--json"), "topology")
    assert "'billing'" in finding["text"]
    assert ("delete the exchange" if url.startswith("amqp") else "delete that file") in finding["next"]


def test_ready_events_without_a_worker_and_dead_letters_are_reported(url: str, doctor: Doctor) -> None:
    declared(url)
    done = doctor("--json")
    assert done.returncode == 0  # no worker, but no ready events: a warning
    assert [one["level"] for one in findings(done, "queue")] == ["warn"]
    with connected(url) as connection:
        channel = connection.channel()
        for key in ("main", "dead", "dead"):
            publish_plainly(channel, "billing", "nobody", b"{}")
            channel.publish([Publication("billing.internal", key, b"{}", {})])
        wait_until(lambda: channel.queue_declare("billing.dead", passive=True).message_count == 2, "two dead letters")
    done = doctor("--json")
    assert done.returncode == 1
    (queue,) = findings(done, "queue")
    assert (queue["level"], queue["text"]) == (
        "fail",
        "billing.main: 1 event ready, 0 consumers. No worker is running, or workers keep crashing.",
    )
    (dead,) = findings(done, "dead letters")
    assert (dead["level"], dead["next"]) == ("warn", "lightbus dead list billing:app --stats")


@pytest.mark.rabbitmq
def test_a_missing_permission_is_found(folder: Path, rabbitmq: nodes.Node, rabbitmq_url: str) -> None:
    declared(rabbitmq_url)
    vhost = rabbitmq_url.rpartition("/")[2]
    user = f"reader-{vhost}"
    rabbitmq.ctl("add_user", user, "s3cr3t")
    for configure, expected in (("^none$", "cannot be configured"), (".*", "Publishing, binding or reading")):
        rabbitmq.ctl("set_permissions", "-p", vhost, user, configure, "^none$", ".*")
        done = lightbus("doctor", "billing:app", "--json", folder=folder, url=rabbitmq.vhost_url(vhost, user, "s3cr3t"))
        assert done.returncode == 1
        assert expected in findings(done, "permissions")[0]["text"]
        assert "lightbus topology permissions" in findings(done, "permissions")[0]["next"]
        assert "s3cr3t" not in done.stdout + done.stderr


def test_a_missing_catalogue_is_a_note_and_an_existing_one_is_tried(url: str, doctor: Doctor) -> None:
    declared(url)
    (missing,) = findings(doctor("--json"), "catalog")
    assert (missing["level"], missing["text"], missing["next"]) == (
        "note",
        "The stream 'lightbus.catalog' does not exist: no contract has been published here.",
        "Run once, as a user with permission to configure it: lightbus catalog",
    )
    app = Lightbus("billing", url=url)
    storage.publish(app.broker, contract_of(app))
    before = storage.read(app.broker).contracts
    (found,) = findings(doctor("--json"), "catalog")
    assert (found["level"], found["text"]) == (
        "ok",
        "The app can publish its contract to lightbus.catalog, and read those of all apps.",
    )
    assert storage.read(app.broker).contracts == before


@pytest.mark.rabbitmq
def test_a_user_who_may_not_use_the_catalogue_is_found(folder: Path, rabbitmq: nodes.Node, rabbitmq_url: str) -> None:
    app = declared(rabbitmq_url)
    storage.publish(app.broker, contract_of(app))
    vhost = rabbitmq_url.rpartition("/")[2]
    user = f"billing-{vhost}"
    own, bus = r"billing(\..+)?", r"lightbus(\.catalog)?"
    rabbitmq.ctl("add_user", user, "s3cr3t")
    for write, read, expected in (
        ("lightbus", bus, "The app's contract cannot be published: "),
        (bus, "lightbus", "The contracts of all apps cannot be read: "),
        (bus, bus, "The app can publish its contract"),
    ):
        permissions = (f"^{own}$", f"^({own}|{write})$", f"^({own}|{read})$")
        rabbitmq.ctl("set_permissions", "-p", vhost, user, *permissions)
        done = lightbus("doctor", "billing:app", "--json", folder=folder, url=rabbitmq.vhost_url(vhost, user, "s3cr3t"))
        (found,) = findings(done, "catalog")
        assert found["text"].startswith(expected)
        if found["level"] != "ok":
            assert (found["level"], found["next"]) == (
                "warn",
                "lightbus topology permissions billing:app prints what it needs.",
            )
            assert "lightbus.catalog" in found["text"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("amqp://ann:s3cr3t@127.0.0.1:1/", "No connection to amqp://ann:**@127.0.0.1:1/: Connection refused"),
        ("amqps://ann:s3cr3t@nowhere.invalid/", "the host name cannot be resolved"),
        ("amqp://ann:s3cr3t@127.0.0.1:1/;amqp://ann:s3cr3t@127.0.0.1:2/", "127.0.0.1:2/: Connection refused"),
    ],
)
def test_an_unreachable_broker_is_reported_without_its_password(folder: Path, url: str, expected: str) -> None:
    done = lightbus("doctor", url, folder=folder, url="")
    assert done.returncode == 1
    assert expected in done.stdout
    assert "Check the host and port in LIGHTBUS_URL" in done.stdout
    assert "s3cr3t" not in done.stdout + done.stderr


@pytest.mark.rabbitmq
def test_a_wrong_password_and_a_stopped_broker_are_distinguished(folder: Path, rabbitmq: nodes.Node) -> None:
    done = lightbus("doctor", rabbitmq.vhost_url("/", "ann", "s3cr3t"), folder=folder, url="")
    assert done.returncode == 1
    assert "refused the user name or password" in done.stdout
    assert "s3cr3t" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("scheme", "product", "version", "level"),
    [
        ("amqp", "RabbitMQ", "3.9.29", "fail"),
        ("amqp", "RabbitMQ", "3.10.0", "ok"),
        ("amqp", "RabbitMQ", "3.13.7", "ok"),
        ("amqp", "RabbitMQ", "4.1.0-rc.1", "ok"),
        ("amqp", "RabbitMQ", "5.0.0", "warn"),
        ("amqp", "RabbitMQ", "", "warn"),
        ("amqp", "Other", "1", "warn"),
        ("memory", "Lightbus embedded broker", __version__, "ok"),
        ("activemq", "apache-activemq-artemis", "2.40.0", "ok"),
        ("activemq", "apache-activemq-artemis", "2.41.0", "ok"),
        ("activemq", "apache-activemq-artemis", "2.39.0", "warn"),
        ("activemq", "apache-activemq-artemis", "3.0.0", "warn"),
        ("activemq", "ActiveMQ", "5.17.2", "warn"),
    ],
)
def test_supported_versions(scheme: str, product: str, version: str, level: str) -> None:
    address = parse_address(f"{scheme}://localhost")
    assert check_version(address, {"product": product, "version": version}).level == level


@pytest.mark.parametrize(("death", "level"), [(1000, "ok"), (1004, "ok"), (1100, "warn"), (900, "warn"), ("?", "note")])
def test_different_clocks_are_reported(death: Any, level: str) -> None:
    dead_letter = Delivery(None, 1, False, "", "", {"headers": {"x-death": [{"time": death}]}}, b"")  # type: ignore[arg-type]
    assert check_clock(dead_letter, 1000.2, 1000.4).level == level


def test_a_source_that_is_probably_a_typo_is_reported(tmp_path: Path, url: str) -> None:
    (tmp_path / "billing.py").write_text(
        'from lightbus import Lightbus\napp = Lightbus("billing")\n'
        '@app.on("order.placed", source="shpo")\ndef charge(order: dict): ...\n'
        '@app.on("order.placed", source="ware")\ndef pack(order: dict): ...\n'
    )
    with connected(url) as connection:
        declare(connection, topology.publishing("shop"))
    with working("billing:app", folder=tmp_path, url=url) as worker:
        done = lightbus("doctor", "billing:app", folder=tmp_path, url=url)
        worker.end(signal.SIGTERM)
    assert done.returncode == 0
    assert "warn  source        charge: handles events of 'shpo' only, and no worker of such an app" in done.stdout
    assert "Did you mean 'shop', which exists?" in done.stdout
    assert "note  source        pack: handles events of 'ware' only" in done.stdout
    assert "No problems found" not in done.stdout
    assert "No app 'shpo' has run on this broker yet" in worker.output
    assert "Did you mean 'shop', which exists?" in worker.output
