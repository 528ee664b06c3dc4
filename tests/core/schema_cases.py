"""Draw JSON schemas: nested, with references, enums, patterns, bounds and alternatives."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]
PATTERNS = ("^[a-c]{1,4}$", "^x\\d{2}$", "^(on|off)$", "^[A-Z][a-z]?$")
FORMATS = ("date", "time", "ipv4", "uuid")
MAX_DEPTH = 3


class SchemaMaker:
    """Schemas whose answers are mostly short, so that they end."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)

    def make(self) -> Schema:
        """Return a schema; half of them have definitions that parts refer to."""
        schema = self._any(0)
        if self._draw.random() < 0.5:
            schema = {
                "type": "object",
                "properties": {"first": {"$ref": "#/$defs/one"}, "tree": {"$ref": "#/$defs/tree"}},
                "required": ["first"],
                "additionalProperties": False,
                "$defs": {"one": schema, "tree": self._tree()},
            }
        return schema

    def _tree(self) -> Schema:
        return {
            "type": "object",
            "properties": {
                "value": self._leaf(),
                "children": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/tree"}},
            },
            "required": ["value"],
            "additionalProperties": False,
        }

    def _any(self, depth: int) -> Schema:
        if depth >= MAX_DEPTH or self._draw.random() < 0.3:
            return self._leaf()
        kinds: list[Callable[[int], Schema]] = [self._object, self._array, self._any_of, self._all]
        return self._draw.choice(kinds)(depth + 1)

    def _leaf(self) -> Schema:
        draw = self._draw
        kinds: list[Callable[[], Schema]] = [
            lambda: {"enum": draw.sample(["red", "a b", 'quo"te', "é", 3, -1.5, None, True], 3)},
            lambda: {"const": draw.choice(["x", 7, None, False, [1, "a"], {"k": 1}])},
            lambda: {"type": "string", "pattern": draw.choice(PATTERNS)},
            lambda: {"type": "string", "minLength": draw.randint(0, 2), "maxLength": 4},
            lambda: {"type": "string", "format": draw.choice(FORMATS)},
            lambda: {"type": "integer", "minimum": draw.randint(-50, 0), "maximum": 300},
            lambda: {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 3000},
            lambda: {"type": "integer", "minimum": 0, "maximum": 500, "multipleOf": 5},
            lambda: {"type": "number", "minimum": -2.5, "maximum": draw.choice([0, 7.25, 1e3])},
            lambda: {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.125},
            lambda: {"type": ["boolean", "null"]},
            lambda: {"type": "boolean"},
            lambda: {"type": "null"},
        ]
        return draw.choice(kinds)()

    def _object(self, depth: int) -> Schema:
        draw = self._draw
        names = draw.sample(["a", "b_c", "with space", "ünï", "n1"], draw.randint(1, 4))
        return {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": [name for name in names if draw.random() < 0.6],
            "additionalProperties": draw.choice([False, False, {"type": "boolean"}]),
        }

    def _array(self, depth: int) -> Schema:
        draw = self._draw
        low = draw.randint(0, 2)
        array: Schema = {"type": "array", "minItems": low, "maxItems": low + draw.randint(0, 2)}
        if draw.random() < 0.3:
            first = [self._any(depth), self._any(depth)]
            return {**array, "prefixItems": first, "items": self._leaf()}
        return {**array, "items": self._any(depth)}

    def _any_of(self, depth: int) -> Schema:
        return {"anyOf": [self._any(depth) for _ in range(self._draw.randint(1, 3))]}

    def _all(self, depth: int) -> Schema:
        return {"allOf": [self._object(depth)], "description": "one part of a whole"}
