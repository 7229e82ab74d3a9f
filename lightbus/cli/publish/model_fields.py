"""The types of a Pydantic model's fields, from its JSON Schema: for the fields on the command line."""

from __future__ import annotations

from typing import Any

import attrs

from lightbus import pydantic_models


@attrs.frozen
class Part:
    """A part of a JSON Schema."""

    schema: dict[str, Any]
    definitions: dict[str, dict[str, Any]]

    def alternatives(self) -> list[dict[str, Any]]:
        """The schemas that a value may fit, without references."""
        found: list[dict[str, Any]] = []
        left = [self.schema]
        while left:
            one = left.pop(0)
            if "$ref" in one:
                left.append(self.definitions[one["$ref"].rpartition("/")[2]])
                continue
            inner = [part for name in ("anyOf", "oneOf", "allOf") for part in one.get(name, ())]
            left += inner
            if not inner:
                found.append(one)
        return found

    def fields(self) -> dict[str, Any]:
        """The fields of the objects among the alternatives, by name."""
        return {
            name: Part(part, self.definitions)
            for one in self.alternatives()
            for name, part in one.get("properties", {}).items()
        }

    def takes_text(self) -> bool:
        """Whether a string may be a value."""
        return any(one.get("type") == "string" for one in self.alternatives())


def types(cls: type[Any]) -> dict[str, Part]:
    """The fields of a model, by the names that it reads."""
    root, definitions = pydantic_models.json_schema(cls, reads=True)
    return Part(root, definitions).fields()
