"""A catalogue as one AsyncAPI 3.0 document for the whole bus. Pure: a value in, a value out.

A channel for each event of each app, with the exchange and the routing key in its AMQP binding; an operation `send` of
the app that publishes it, and an operation `receive` of each app whose handlers get it. Schemas are translated from
JSON Schema 2020-12 to AsyncAPI's dialect, which extends draft 07.

Sources: https://www.asyncapi.com/docs/reference/specification/v3.0.0 and
https://github.com/asyncapi/bindings/tree/master/amqp.
"""

from __future__ import annotations

import re
from typing import Any

from lightbus.catalog.catalog import Catalog, Subscriber
from lightbus.catalog.contract import Contract, PublishedEvent
from lightbus.catalog.schemas import Schema
from lightbus.version import __version__
from lightbus.wire.codec import CAUSATION, VERSION

ASYNCAPI = "3.0.0"
BINDING = "0.3.0"
"""The version of AMQP's bindings."""
DEEPEST = 50
"""Levels of a schema that are translated. Any value is valid below them."""

_SCHEMAS = {"additionalProperties", "contains", "else", "if", "items", "not", "propertyNames", "then"}
"""Keywords whose value is a schema."""
_LISTS = {"allOf", "anyOf", "items", "oneOf"}
"""Keywords whose value can be an array of schemas."""
_DICTIONARIES = {"patternProperties", "properties"}
"""Keywords whose value is an object with schemas."""
_DROPPED = {"$anchor", "$comment", "$defs", "$dynamicAnchor", "$dynamicRef", "$id", "$schema", "definitions"}


def document(catalog: Catalog) -> dict[str, Any]:
    """The document, as a JSON object."""
    channels: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    messages: dict[str, Any] = {}
    schemas: dict[str, Any] = {}
    for contract, event in catalog.events():
        key = _key(contract.app, event.name)
        if key in channels:  # two names that differ only in characters that a key cannot have
            continue
        channels[key] = _channel(contract, event, key)
        messages[key] = _message(event, key)
        schemas |= _components(event.schema, key)
        operations[_key("send", contract.app, event.name)] = _send(contract, event, key)
        by_app: dict[str, list[Subscriber]] = {}
        for one in catalog.subscribers(event.name, contract.app):
            by_app.setdefault(one.contract.app, []).append(one)
        for app, subscribers in by_app.items():
            operations[_key("receive", app, contract.app, event.name)] = _receive(
                app, contract, event, key, subscribers
            )
    schemas["envelope"] = _envelope()
    return {
        "asyncapi": ASYNCAPI,
        "info": {
            "title": "Events of the bus",
            "version": "1.0.0",
            "description": (
                f"The events of {len(catalog.contracts):,} apps, and the apps that handle them. Each app publishes to "
                "the topic exchange of its name, with the event's name as the routing key. Subscribers bind a queue to "
                "that exchange, or to the exchange `lightbus` for the events of all apps."
            ),
            "tags": [{"name": one.app} for one in catalog.contracts],
        },
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": operations,
        "components": {"messages": messages, "schemas": schemas},
    }


def _channel(contract: Contract, event: PublishedEvent, key: str) -> dict[str, Any]:
    return {
        "address": event.name,
        "title": event.name,
        **_description(event.doc),
        "messages": {"event": {"$ref": f"#/components/messages/{key}"}},
        "tags": [{"name": contract.app}],
        "bindings": {
            "amqp": {
                "is": "routingKey",
                "exchange": {"name": contract.app, "type": "topic", "durable": True, "autoDelete": False},
                "bindingVersion": BINDING,
            }
        },
    }


def _message(event: PublishedEvent, key: str) -> dict[str, Any]:
    return {
        "name": event.name,
        "title": event.name,
        **_description(event.doc),
        "contentType": "application/json",
        "headers": {"$ref": "#/components/schemas/envelope"},
        "payload": {"$ref": f"#/components/schemas/{key}"},
        "bindings": {"amqp": {"messageType": event.name, "bindingVersion": BINDING}},
        "x-lightbus-version": event.version,
    }


def _send(contract: Contract, event: PublishedEvent, key: str) -> dict[str, Any]:
    return {
        "action": "send",
        "channel": {"$ref": f"#/channels/{key}"},
        "title": f"{contract.app} publishes {event.name}",
        "messages": [{"$ref": f"#/channels/{key}/messages/event"}],
        "tags": [{"name": contract.app}],
        "bindings": {"amqp": {"deliveryMode": 2, "mandatory": True, "timestamp": True, "bindingVersion": BINDING}},
    }


def _receive(
    app: str, publisher: Contract, event: PublishedEvent, key: str, subscribers: list[Subscriber]
) -> dict[str, Any]:
    handlers = [
        {"name": one.listener.handler, "queue": one.listener.queue, "patterns": one.listener.patterns}
        for one in subscribers
    ]
    return {
        "action": "receive",
        "channel": {"$ref": f"#/channels/{key}"},
        "title": f"{app} handles {event.name} of {publisher.app}",
        **_description("\n\n".join(one.listener.doc for one in subscribers if one.listener.doc)),
        "messages": [{"$ref": f"#/channels/{key}/messages/event"}],
        "tags": [{"name": app}],
        "bindings": {"amqp": {"ack": True, "bindingVersion": BINDING}},
        "x-lightbus-handlers": handlers,
    }


def _envelope() -> Schema:
    """The headers of each event. docs/wire.md describes them, and the AMQP properties."""
    return {
        "type": "object",
        "title": "Envelope",
        "description": (
            "The AMQP properties of an event are: `message_id` (its id, a UUIDv7 unless the publisher sets it), "
            "`timestamp`, `correlation_id` (the id of the first event of the chain), `type` (the event's name), "
            f"`app_id` (the app's name), `content_type` and `delivery_mode` 2. Written by Lightbus {__version__}."
        ),
        "properties": {
            VERSION: {"type": "integer", "minimum": 1, "description": "The version of the event's class."},
            CAUSATION: {
                "type": "string",
                "description": "The id of the event whose handler published this one.",
            },
        },
    }


def _description(text: str) -> dict[str, str]:
    return {"description": text} if text else {}


def _key(*names: str) -> str:
    """A key of a component, and of a channel, so that references need no escapes."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", ".".join(names))


# --- schemas ----------------------------------------------------------------------------------


def _components(schema: Schema, key: str) -> dict[str, Schema]:
    """The schemas of an event: its body, and each part that it refers to, as separate components."""
    parts = schema.get("$defs")
    parts = parts if isinstance(parts, dict) else {}
    return {
        key: _translated(schema, key, parts),
        **{_part_key(key, name): _translated(part, key, parts) for name, part in parts.items()},
    }


def _part_key(key: str, name: str) -> str:
    return _key(key, "-", name)


def _leads_nowhere(target: str, parts: dict[str, Any]) -> bool:
    """Whether a reference names no part of the schema, or only leads to itself. (The schema is another app's.)"""
    seen: set[str] = set()
    while target not in seen:
        seen.add(target)
        name = target.removeprefix("#/$defs/")
        if name == target or name not in parts:
            return True
        part = parts[name]
        if not isinstance(part, dict) or not isinstance(part.get("$ref"), str):
            return False
        target = part["$ref"]
    return True


def _translated(schema: object, key: str, parts: dict[str, Any], depth: int = DEEPEST) -> Schema:
    """A schema of 2020-12 in AsyncAPI's dialect. An object, because AsyncAPI does not take `true` everywhere."""
    if not isinstance(schema, dict) or depth == 0:
        return {"not": {}} if schema is False else {}
    if isinstance(reference := schema.get("$ref"), str):
        name = reference.removeprefix("#/$defs/")
        return {} if _leads_nowhere(reference, parts) else {"$ref": f"#/components/schemas/{_part_key(key, name)}"}

    def translated(part: object) -> Schema:
        return _translated(part, key, parts, depth - 1)

    found: Schema = {}
    for keyword, value in schema.items():
        if keyword in _DROPPED:
            continue
        if keyword in _DICTIONARIES and isinstance(value, dict):
            # The official parser takes a field named `$ref` for a reference, and fails.
            found[keyword] = {name: translated(part) for name, part in value.items() if name != "$ref"}
        elif keyword in _LISTS and isinstance(value, list):
            found[keyword] = [translated(part) for part in value]
        elif keyword in _SCHEMAS:
            found[keyword] = translated(value)
        elif keyword != "prefixItems":
            found[keyword] = value
    if isinstance(first := schema.get("prefixItems"), list):  # draft 07 has `items` and `additionalItems` for it
        rest = found.pop("items", None)
        found["items"] = [translated(part) for part in first]
        if rest is not None:
            found["additionalItems"] = rest
    if isinstance(found.get("discriminator"), dict):  # an object in OpenAPI
        chosen = found.pop("discriminator").get("propertyName")
        if isinstance(chosen, str):
            found["discriminator"] = chosen
    return found
