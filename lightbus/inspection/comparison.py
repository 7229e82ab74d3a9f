"""Compares what exists on a broker with what an app declares."""

from __future__ import annotations

import amqp.exceptions

from lightbus.connection.address import Address
from lightbus.connection.declare import declare
from lightbus.connection.diagnosis import describe, is_conflict, message_of
from lightbus.inspection.finding import Finding
from lightbus.transport import Connection
from lightbus.wire.topology import Topology


def differences(
    connection: Connection, address: Address, one: Topology, target: str, *, restricted: bool = False
) -> list[Finding]:
    """Declare existing objects again, on a separate channel. The broker reports a difference, or refuses the access.

    Args:
        target: MODULE:ATTR, for the next step.
        restricted: an app's user may not configure this, so a refusal is not a finding.
    """
    try:
        declare(connection, one)
    except amqp.exceptions.PreconditionFailed as error:
        answer = message_of(error)
        if not is_conflict(answer, address):
            return [Finding("fail", "topology", str(describe(error, address)), "See above.")]
        text = f"It differs from what the app declares: {answer}."
        return [Finding("fail", "topology", text, address.broker.resolution(answer, address))]
    except amqp.exceptions.AccessRefused as error:
        if restricted:  # as intended: only an administrator may configure the bus
            return []
        text = f"The app's own names cannot be configured (declared): {message_of(error)}."
        return [Finding("fail", "permissions", text, f"lightbus topology permissions {target} prints what it needs.")]
    return []
