"""Does a value fit a JSON schema, such as the parameters of a tool?

In: a value, a schema. Out: yes or no. Next: turns.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "integer": lambda value: not isinstance(value, bool) and isinstance(value, int | float) and value == int(value),
}


def holds(value: Any, schema: Any) -> bool:
    """Whether a value fits a JSON schema in type, enum, const, required, properties, additionalProperties, items, anyOf, oneOf.

    What else a schema says (patterns, lengths, references) is not looked at.
    """
    if not isinstance(schema, dict):
        return True
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    allowed = [*_listed(schema, "enum"), *([schema["const"]] if "const" in schema else [])]
    choices = [inner for name in ("anyOf", "oneOf") for inner in _listed(schema, name)]
    fits = (
        not kinds or any(_TYPES[kind](value) for kind in kinds if kind in _TYPES),
        not allowed or value in allowed,
        not choices or any(holds(value, inner) for inner in choices),
        not isinstance(value, list) or all(holds(item, schema.get("items")) for item in value),
        not isinstance(value, dict) or _fields_hold(value, schema),
    )
    return all(fits)


def _listed(schema: dict[str, Any], name: str) -> list[Any]:
    return found if isinstance(found := schema.get(name), list) else []


def _fields_hold(value: dict[str, Any], schema: dict[str, Any]) -> bool:
    found = schema.get("properties")
    properties: dict[str, Any] = found if isinstance(found, dict) else {}
    if any(name not in value for name in _listed(schema, "required")):
        return False
    if schema.get("additionalProperties") is False and value.keys() - properties.keys():
        return False
    return all(holds(inner, properties.get(name)) for name, inner in value.items())
