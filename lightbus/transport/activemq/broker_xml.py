"""The parts of Artemis' broker.xml that Lightbus needs. Pure text.

The administrator's part (`administrator`) is the same for all apps and is written once. It has no address of an app:
wildcards match those that apps create.
"""

from __future__ import annotations

from lightbus.transport.activemq.names import BUS_ADDRESS, CATALOG, CONTRACTS, DEAD_ADDRESS, DELAYS, EXCHANGES

BUS_DIVERT = "lightbus-bus"
CATALOG_DIVERT = "lightbus-catalog"
FIXED_ADDRESSES = (BUS_ADDRESS, DEAD_ADDRESS, CATALOG)
"""The addresses of the administrator's part. Apps create all others."""

DELIVERY_ATTEMPTS = 21
CATALOG_SIZE = 10_000
CATALOG_DAYS = 90
"""A contract that was not published again for so many days is deleted."""

ACCEPTOR_OPTIONS = "protocols=AMQP;amqpDuplicateDetection=false"
"""Without the last one, the broker takes the message id of an event for that of a duplicate, also of a retry."""

SETTINGS = """\
<!-- Rights on single management operations: apps may read the counts of their own queues, and nothing else. -->
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
  </address-setting>
  <!-- Delayed events. They expire when they are due, and then reach the queues of all apps. -->
  <address-setting match="{DELAYS}#">
    <expiry-address>{BUS_ADDRESS}</expiry-address>
    <default-address-routing-type>ANYCAST</default-address-routing-type>
    <default-queue-routing-type>ANYCAST</default-queue-routing-type>
  </address-setting>
</address-settings>
"""


def administrator() -> str:
    """The elements to add to `<core>` in broker.xml."""
    return "\n".join([SETTINGS, ADDRESSES, DIVERTS, ADDRESS_SETTINGS])
