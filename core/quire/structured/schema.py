"""What is checked in a JSON schema for every engine: old keywords, and whether an answer can end.

Keywords are those of draft 2020-12. Source: JSON Schema Core and Validation, 2020-12.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

# Keywords of older drafts that a newer reading ignores: a check that would be looser than asked.
OLD_KEYWORDS = {"additionalItems", "dependencies", "disallow", "divisibleBy", "extends"}
ONE_SCHEMA = {
    *("additionalProperties", "contains", "contentSchema", "else", "if", "items", "not"),
    *("propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"),
}
SCHEMA_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
SCHEMA_TABLES = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
MAX_ROUNDS = 64


def check_schema(schema: Any) -> None:
    """Refuse old keywords, and schemas that no finite answer fulfils.

    Raises: ValueError naming the keyword.
    """
    every = list(_subschemas(schema))
    for one in every:
        _check_keywords(one)
    # Without a reference none contains itself, and looking takes two thirds of the time.
    ending = _ending(schema, every) if any("$ref" in one for one in every) else None
    if ending is not None and not all(id(one) in ending for one in every):
        is_whole = isinstance(schema, dict) and id(schema) not in ending
        which = "its answers never end" if is_whole else "answers of a part of it never end"
        raise ValueError(f"{which}: what it requires contains itself ($ref)")


def _check_keywords(schema: Mapping[str, Any]) -> None:
    if not OLD_KEYWORDS.isdisjoint(schema):
        name = min(OLD_KEYWORDS.intersection(schema))
        raise ValueError(f"keyword {name!r} of an older draft is not supported")
    if isinstance(schema.get("items"), list):
        raise ValueError("keyword 'items' is a list, of an older draft; write 'prefixItems'")
    for name in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(name), bool):
            raise ValueError(f"keyword {name!r} is true or false, of an older draft; give a number")


def _subschemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a schema and all in it or referred to, each once, but not true and false."""
    todo, seen = [schema], set()
    while todo:
        one = todo.pop()
        if not isinstance(one, dict) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one.get("$ref"), str):
            todo.append(_resolve(one["$ref"], schema))
        for name, value in one.items():
            if name in ONE_SCHEMA:
                todo.append(value)
            elif name in SCHEMA_LISTS:
                todo += value if isinstance(value, list) else []
            elif name in SCHEMA_TABLES:
                todo += value.values() if isinstance(value, dict) else []


def _ending(root: Any, every: list[Mapping[str, Any]]) -> set[int] | None:
    """Return the schemas that a finite value may fulfil, by `id`; None where it is not known.

    From nothing known to end, schemas are added whose required parts all end, until none comes.
    """
    ending: set[int] = set()
    for _ in range(MAX_ROUNDS):
        found = {id(one) for one in every if _ends(one, root, ending)}
        if found == ending:
            return ending
        ending = found
    return None


def _ends(schema: Any, root: Any, ending: set[int]) -> bool:
    def known(part: Any) -> bool:
        return not isinstance(part, dict) or id(part) in ending

    if "const" in schema or "enum" in schema:
        return True
    reference = schema.get("$ref")
    if isinstance(reference, str) and not known(_resolve(reference, root)):
        return False
    if not all(known(part) for part in _listed(schema, "allOf")):
        return False
    for name in ("anyOf", "oneOf"):
        parts = _listed(schema, name)
        if parts and not any(known(part) for part in parts):
            return False
    if schema.get("type") in ("object", ["object"]):
        return all(known(part) for part in _required(schema))
    if schema.get("type") in ("array", ["array"]) and _at_least_one(schema):
        first = _listed(schema, "prefixItems")[:1] or [schema.get("items", True)]
        return known(first[0])
    return True


def _listed(schema: Mapping[str, Any], name: str) -> list[Any]:
    found = schema.get(name)
    return found if isinstance(found, list) else []


def _required(schema: Mapping[str, Any]) -> list[Any]:
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return []
    names = [name for name in _listed(schema, "required") if isinstance(name, str)]
    return [properties[name] for name in names if name in properties]


def _at_least_one(schema: Mapping[str, Any]) -> bool:
    count = schema.get("minItems", 0)
    return isinstance(count, (int, float)) and count >= 1


def _resolve(reference: str, root: Any) -> Any:
    """Return what a pointer into the same schema names; True where it leads elsewhere."""
    if reference[:2] not in ("#", "#/"):
        return True
    place = root
    for part in unquote(reference[1:]).split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(place, dict) and name in place:
            place = place[name]
        elif isinstance(place, list) and name.isdecimal() and int(name) < len(place):
            place = place[int(name)]
        else:
            return True
    return place
