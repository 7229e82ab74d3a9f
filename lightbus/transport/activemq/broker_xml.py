"""The parts of Artemis' broker.xml that Lightbus needs. Pure text.

The administrator's part (`administrator`) is the same for all apps and is written once. It has no address of an app:
wildcards match those that apps create. Each app adds security-settings (`permissions`) for its own user.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from xml.sax.saxutils import quoteattr

import attrs

from lightbus.transport.activemq.names import (
    BUS_ADDRESS,
    CATALOG,
    CONTRACTS,
    DEAD,
    DEAD_ADDRESS,
    DELAYS,
    EXCHANGES,
    MANAGEMENT,
    REPLIES,
    queue_address,
    reply_address,
)

BUS_DIVERT = "lightbus-bus"
CATALOG_DIVERT = "lightbus-catalog"
FIXED_ADDRESSES = (BUS_ADDRESS, DEAD_ADDRESS, CATALOG)
"""The addresses of the administrator's part. Apps create all others."""

DELIVERY_ATTEMPTS = 21
"""As on RabbitMQ, whose delivery limit is 20 redeliveries. Which of them Artemis counts: see `transactions`."""
CATALOG_SIZE = 10_000
CATALOG_DAYS = 90
"""A contract that was not published again for so many days is deleted."""

ACCEPTOR_OPTIONS = "protocols=AMQP;amqpDuplicateDetection=false;amqpIdleTimeout=20000"
"""Without other protocols, and without duplicate detection, which Lightbus does not use. A client that is silent for 20
seconds is dead: its events go to others."""

ADMIN_ROLE = "amq"
"""The role of administrators, as `artemis create` names it."""
SHARED_ROLE = "lightbus"
"""The role that the users of all apps have."""

ACCEPTOR = f"""\
<!-- In <acceptors>, for the apps (with TLS: see the manual of Artemis):
       <acceptor name="amqp">tcp://0.0.0.0:5672?{ACCEPTOR_OPTIONS}</acceptor>
     The users of apps must not reach an acceptor with other protocols (that of `artemis create` on port 61616 has them
     all): only with a message that arrived over AMQP does the broker note its source where clients of AMQP see it. -->
"""

SETTINGS = """\
<!-- Required: the rights below on `mops` addresses are for single management operations. Without this line, the right
     `manage`, which apps have, is for all operations. -->
<management-message-rbac>true</management-message-rbac>
<!-- Milliseconds. Delayed events expire when they are due, so this is how late they may be. -->
<message-expiry-scan-period>1000</message-expiry-scan-period>
"""

ADDRESSES = f"""\
<addresses>
  <!-- All events. Its queues are those of the apps. -->
  <address name="{BUS_ADDRESS}"><multicast/></address>
  <!-- Dead letters. Its queues are those of the apps. -->
  <address name="{DEAD_ADDRESS}"><multicast/></address>
  <!-- The contracts of all apps. Reading leaves them in the queue, and the oldest are deleted first. -->
  <address name="{CATALOG}">
    <multicast><queue name="{CATALOG}" non-destructive="true" ring-size="{CATALOG_SIZE}"/></multicast>
  </address>
</addresses>
"""

DIVERTS = f"""\
<diverts>
  <!-- An app can only send to its own exchange. The divert notes the address, which proves the source of an event. -->
  <divert name="{BUS_DIVERT}">
    <address>{EXCHANGES}*</address>
    <forwarding-address>{BUS_ADDRESS}</forwarding-address>
    <exclusive>true</exclusive>
  </divert>
  <divert name="{CATALOG_DIVERT}">
    <address>{CONTRACTS}*</address>
    <forwarding-address>{CATALOG}</forwarding-address>
    <exclusive>true</exclusive>
  </divert>
</diverts>
"""

ADDRESS_SETTINGS = f"""\
<address-settings>
  <!-- Queues outlive their consumers, and a full memory is paged to disk. -->
  <address-setting match="lightbus.#">
    <auto-create-queues>true</auto-create-queues>
    <auto-create-addresses>true</auto-create-addresses>
    <auto-delete-queues>false</auto-delete-queues>
    <auto-delete-addresses>false</auto-delete-addresses>
    <address-full-policy>PAGE</address-full-policy>
  </address-setting>
  <!-- A queue is created when an app attaches with its selector. A message to a missing queue is refused: a queue that
       is created for a message has no selector. -->
  <address-setting match="{BUS_ADDRESS}">
    <auto-create-queues>false</auto-create-queues>
    <dead-letter-address>{DEAD_ADDRESS}</dead-letter-address>
    <expiry-address>{DEAD_ADDRESS}</expiry-address>
    <max-delivery-attempts>{DELIVERY_ATTEMPTS}</max-delivery-attempts>
  </address-setting>
  <address-setting match="{DEAD_ADDRESS}">
    <auto-create-queues>false</auto-create-queues>
    <max-delivery-attempts>-1</max-delivery-attempts>
  </address-setting>
  <address-setting match="{CATALOG}">
    <auto-create-queues>false</auto-create-queues>
    <max-delivery-attempts>-1</max-delivery-attempts>
    <expiry-delay>{CATALOG_DAYS * 24 * 60 * 60 * 1000}</expiry-delay>
    <expiry-address></expiry-address>
  </address-setting>
  <!-- Answers to management requests. -->
  <address-setting match="{REPLIES}#">
    <auto-delete-queues>true</auto-delete-queues>
    <auto-delete-addresses>true</auto-delete-addresses>
  </address-setting>
  <!-- Delayed events. They expire when they are due, and then reach the queues of all apps. -->
  <address-setting match="{DELAYS}#">
    <expiry-address>{BUS_ADDRESS}</expiry-address>
    <default-address-routing-type>ANYCAST</default-address-routing-type>
    <default-queue-routing-type>ANYCAST</default-queue-routing-type>
  </address-setting>
</address-settings>
"""


def administrator(admin_role: str = ADMIN_ROLE) -> str:
    """The elements to add to `<core>` in broker.xml.

    Only the setting with the most specific `match` counts, so each of ours names the role of the administrators, too.
    """
    rights = _settings(
        # A volatile subscription, for `lightbus tail`. Apps have no right to send.
        _Right(
            BUS_ADDRESS,
            SHARED_ROLE,
            ("createNonDurableQueue", "consume"),
            ("deleteNonDurableQueue", "createDurableQueue", "deleteDurableQueue", "send", "browse"),
        ),
        _Right(CATALOG, SHARED_ROLE, ("browse",), ("consume",)),
        _Right(MANAGEMENT, SHARED_ROLE, ("send", "manage")),
        _Right(f"mops.queue.{CATALOG}.#", SHARED_ROLE, ("view",), ("edit",)),
        _Right(f"{REPLIES}#", "", (), ("createAddress", "createNonDurableQueue", "send", "consume")),
        # Whether another app exists, and whether the divert does.
        _Right(f"mops.address.{EXCHANGES}#", SHARED_ROLE, ("view",), ("edit",)),
        _Right(f"mops.divert.{BUS_DIVERT}.#", SHARED_ROLE, ("view",), ("edit",)),
        # The commands of `artemis queue` need these.
        _Right("mops.#", "", (), ("view", "edit")),
        # An operator changes the selector of a queue, or deletes a queue of an app that no longer exists.
        *(_Right(f"mops.broker.{each}", "", (), ("edit",)) for each in ("updateQueue", "destroyQueue")),
        admin_role=admin_role,
    )
    security = (
        "<security-settings>\n"
        f"  <!-- The users of all apps have the role `{SHARED_ROLE}`. Each has another role, too: see the output of\n"
        f"       lightbus topology permissions MODULE:ATTR. Administrators have the role `{admin_role}`. -->\n"
        f"{textwrap.indent(rights, '  ')}</security-settings>\n"
    )
    return "\n".join([ACCEPTOR, SETTINGS, ADDRESSES, DIVERTS, ADDRESS_SETTINGS, security])


def app_role(app: str) -> str:
    """The role of an app's user. With the prefix, no app's name can be that of a role of other programs."""
    return f"{SHARED_ROLE}.{app}"


def permissions(app: str, queues: Iterable[str], *, user: str | None = None, admin_role: str = ADMIN_ROLE) -> str:
    """The elements to add to `<security-settings>` in broker.xml: the least that an app needs.

    Artemis compares the fully qualified name of a queue (`address::queue`) only as a whole, so each queue is named, and
    one that the app gets later needs its own setting. With it, rights on the queue are separate from those on its
    address: an app sends retries to its queue, and cannot send to `lightbus.bus`. A queue without a setting has the
    rights of its address: all apps can consume it.

    An app needs no right on another app's exchange, also not for `source=`: its queue's selector compares the source.

    Args:
        queues: the names of the queues that the app consumes, without its dead-letter queue.
        user: the broker's user. None: it is named as the app.
    """
    role, user = app_role(app), user or app
    of_queue = ("createDurableQueue", "send", "consume")
    rights = _settings(
        _Right(EXCHANGES + app, role, ("createAddress", "send")),
        _Right(DELAYS + app, role, ("createAddress", "createDurableQueue", "send")),
        _Right(CONTRACTS + app, role, ("createAddress", "send")),
        *(_Right(queue_address(queue), role, of_queue) for queue in (*queues, f"{app}.{DEAD}")),
        # The broker sends the answer with the rights of the app.
        _Right(f"{reply_address(user)}.#", role, ("createAddress", "createNonDurableQueue", "send", "consume")),
        _Right(f"mops.queue.{app}.#", role, ("view",), ("edit",)),
        admin_role=admin_role,
    )
    return (
        f"<!-- {app}. Its user needs two roles. In artemis-roles.properties:\n"
        f"       {SHARED_ROLE} = {user}          (separate the users of several apps with commas)\n"
        f"       {role} = {user} -->\n{rights}"
    )


def queues(selectors: Mapping[str, str]) -> str:
    """The element to add to `<addresses>` in broker.xml, to change the selectors of an app's queues.

    The broker reads a changed broker.xml within some seconds, and the messages in the queues stay. The management
    operation `updateQueue` does the same, but only until the broker restarts (seen in 2.40). After both, the broker
    still compares the selector of a client that attaches with that of the queue's creation: attach without one.
    """
    lines = (
        f"<queue name={quoteattr(name)}><filter string={quoteattr(selector)}/></queue>\n"
        for name, selector in selectors.items()
    )
    inner = textwrap.indent("".join(lines), "    ")
    return f'<address name="{BUS_ADDRESS}">\n  <multicast>\n{inner}  </multicast>\n</address>\n'


@attrs.frozen
class _Right:
    match: str
    role: str
    types: tuple[str, ...]
    """For the role and for administrators."""
    admin_types: tuple[str, ...] = ()
    """For administrators only."""


def _settings(*rights: _Right, admin_role: str) -> str:
    lines: list[str] = []
    for right in rights:
        lines.append(f'<security-setting match="{right.match}">')
        for names, types in ((f"{right.role},{admin_role}", right.types), (admin_role, right.admin_types)):
            lines += (f"  <permission type={quoteattr(each)} roles={quoteattr(names)}/>" for each in types)
        lines.append("</security-setting>")
    return "\n".join([*lines, ""])
