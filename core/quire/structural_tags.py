"""Structural tags: free text with parts in it whose form is given, as a tree of plain data.

A node is a mapping with a `type`; its other keys are in `FIELDS`. What passes here has every key,
lists of marks that can be told apart, and free text only where something says that it ends.
Source: the format of XGrammar's structural tags, which vLLM takes over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from quire.errors import RequestError, shown

Fail = Callable[[str], RequestError]
Node = dict[str, Any]

MAX_NESTING = 16
MAX_TAGS = 1024
MAX_MARK_CHARS = 1024

# Every key of a node and what it holds; a key with a default may be left out.
FIELDS: dict[str, dict[str, str]] = {
    "const_string": {"value": "text"},
    "json_schema": {"json_schema": "schema"},
    "regex": {"pattern": "text"},
    "grammar": {"grammar": "text"},
    "any_text": {"excludes": "marks"},
    "sequence": {"elements": "nodes"},
    "or": {"elements": "nodes"},
    "optional": {"content": "node"},
    "plus": {"content": "node"},
    "star": {"content": "node"},
    "tag": {"begin": "mark", "content": "node", "end": "ends"},
    "triggered_tags": {
        **{"triggers": "marks", "tags": "tags", "at_least_one": "flag"},
        **{"stop_after_first": "flag", "excludes": "marks"},
    },
    "tags_with_separator": {
        **{"tags": "tags", "separator": "mark", "at_least_one": "flag"},
        **{"stop_after_first": "flag"},
    },
}
DEFAULTS: dict[str, Any] = {"excludes": [], "at_least_one": False, "stop_after_first": False}
LONG_TEXTS = ("regex.pattern", "grammar.grammar")
# Of json_schema: what other engines call the form that is the only one here.
PLAIN_STYLE = {"style": "json"}


def read_structural_tag(given: Any, fail: Fail) -> Node:
    """Return the tree of a structural tag, a mapping or its JSON text, checked and complete.

    The older form, `structures` and `triggers`, becomes one node of type `triggered_tags`.
    Raises: what `fail` makes of a fact.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise fail(f"has a structural tag that is no JSON: {str(error)[:80]}") from None
    if not isinstance(given, Mapping):
        raise fail("has a structural tag that is no object")
    fields = {key: value for key, value in given.items() if value is not None}
    kind = fields.pop("type", "structural_tag")
    if kind != "structural_tag":
        raise fail(f"has a structural tag of type {shown(kind)}; allowed: structural_tag")
    if set(fields) == {"format"}:
        node = fields["format"]
    elif set(fields) == {"structures", "triggers"}:
        node = _from_structures(fields["structures"], fields["triggers"], fail)
    else:
        names = ", ".join(map(shown, fields)) or "nothing"
        allowed = "allowed: structures and triggers, or format alone"
        raise fail(f"has a structural tag with {names}; {allowed}")
    tree = _Reader(fail).node(node, 0)
    _check_places(tree, fail, is_last=True)
    return tree


def nodes_of(tree: Node) -> Iterator[Node]:
    """Yield a tree's nodes, the outermost first."""
    todo = [tree]
    while todo:
        node = todo.pop(0)
        yield node
        todo += [*node.get("elements", ()), *node.get("tags", ())]
        todo += [node["content"]] if "content" in node else []


def schemas_of(tree: Node) -> Iterator[tuple[str, Any]]:
    """Yield each JSON schema, with the mark before it, which names it in errors."""
    todo = [("", tree)]
    while todo:
        mark, node = todo.pop(0)
        if node["type"] == "json_schema":
            yield mark, node["json_schema"]
        mark = node.get("begin", "") or mark
        inner = [*node.get("elements", ()), *node.get("tags", ())]
        todo += [(mark, each) for each in inner]
        todo += [(mark, node["content"])] if "content" in node else []


def _from_structures(structures: Any, triggers: Any, fail: Fail) -> Node:
    if not isinstance(structures, (list, tuple)) or not structures:
        raise fail("has structures that are no list, or an empty one")
    tags = []
    for position, one in enumerate(structures):
        if not isinstance(one, Mapping) or set(one) != {"begin", "schema", "end"}:
            raise fail(f"has structures[{position}] that is no object of begin, schema and end")
        content = {"type": "json_schema", "json_schema": one["schema"]}
        tags.append({"type": "tag", "begin": one["begin"], "content": content, "end": one["end"]})
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


class _Reader:
    """Checks nodes and fills what was left out."""

    def __init__(self, fail: Fail) -> None:
        self._fail = fail
        self._num_tags = 0

    def node(self, given: Any, depth: int) -> Node:
        if depth > MAX_NESTING:
            raise self._fail(f"nests formats deeper than allowed: up to {MAX_NESTING} levels")
        kind = given.get("type") if isinstance(given, Mapping) else None
        if not isinstance(kind, str) or kind not in FIELDS:
            what = "no object" if not isinstance(given, Mapping) else f"of type {shown(kind)}"
            raise self._fail(f"has a format that is {what}; allowed: {', '.join(FIELDS)}")
        known, node = FIELDS[kind], {"type": kind}
        for key, value in given.items():
            if key not in known and key != "type" and not _says_nothing(key, value):
                allowed = f"allowed: {', '.join(known)}"
                raise self._fail(f"has {shown(key)} in a format of type {kind}; {allowed}")
        for key, what in known.items():
            value = given.get(key, DEFAULTS.get(key))
            node[key] = getattr(self, f"_{what}")(value, f"{kind}.{key}", depth)
        if kind == "triggered_tags":
            self._check_triggers(node)
        return node

    def _text(self, value: Any, where: str, depth: int) -> str:
        if not isinstance(value, str) or not value:
            raise self._fail(f"has a {where} that is no text, or an empty one")
        return self._mark(value, where, depth)

    def _mark(self, value: Any, where: str, depth: int) -> str:
        is_mark = isinstance(value, str) and "\0" not in value
        if not is_mark or (len(value) > MAX_MARK_CHARS and where not in LONG_TEXTS):
            allowed = f"up to {MAX_MARK_CHARS} characters, none of them NUL"
            raise self._fail(f"has a {where} that is {shown(value)}; allowed: a text of {allowed}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._fail(f"has a {where} with half a surrogate pair; send Unicode") from None
        return str(value)

    def _marks(self, value: Any, where: str, depth: int) -> list[str]:
        if not isinstance(value, (list, tuple)) or len(value) > MAX_TAGS:
            raise self._fail(f"has {where} that are no list of up to {MAX_TAGS} texts")
        return [self._text(one, where, depth) for one in value]

    def _ends(self, value: Any, where: str, depth: int) -> list[str]:
        ends = [value] if isinstance(value, str) else value
        if not isinstance(ends, (list, tuple)) or not ends or len(ends) > MAX_TAGS:
            raise self._fail(f"has a {where} that is neither a text nor a list of some")
        return [self._mark(one, where, depth) for one in ends]

    def _flag(self, value: Any, where: str, depth: int) -> bool:
        if not isinstance(value, bool):
            raise self._fail(f"has a {where} that is {shown(value)}; allowed: true or false")
        return value

    def _schema(self, value: Any, where: str, depth: int) -> Any:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise self._fail(f"has a schema that is no JSON: {str(error)[:80]}") from None
        if not isinstance(value, (Mapping, bool)):
            raise self._fail("has a schema that is neither an object nor true or false")
        return value

    def _nodes(self, value: Any, where: str, depth: int) -> list[Node]:
        if not isinstance(value, (list, tuple)) or not 0 < len(value) <= MAX_TAGS:
            raise self._fail(f"has {where} that are no list of 1 to {MAX_TAGS} formats")
        return [self.node(one, depth + 1) for one in value]

    def _node(self, value: Any, where: str, depth: int) -> Node:
        return self.node(value, depth + 1)

    def _tags(self, value: Any, where: str, depth: int) -> list[Node]:
        tags = self._nodes(value, where, depth)
        self._num_tags += len(tags)
        if self._num_tags > MAX_TAGS:
            raise self._fail(f"has more tags than allowed: up to {MAX_TAGS}")
        wrong = [tag["type"] for tag in tags if tag["type"] != "tag"]
        if wrong:
            raise self._fail(f"has {where} with a format of type {wrong[0]}; allowed: tag")
        return tags

    def _check_triggers(self, node: Node) -> None:
        """Refuse triggers that nothing follows, and tags that none or several announce."""
        triggers, begins = node["triggers"], [tag["begin"] for tag in node["tags"]]
        if not triggers:
            raise self._fail("has no triggers; give the texts that tags begin with")
        for begin in begins:
            found = [trigger for trigger in triggers if begin.startswith(trigger)]
            if len(found) != 1:
                raise self._fail(
                    f"has a tag that begins with {shown(begin)}, which {len(found)} of the "
                    "triggers begin; allowed: exactly one"
                )
        for trigger in triggers:
            if not any(begin.startswith(trigger) for begin in begins):
                raise self._fail(f"has the trigger {shown(trigger)}, with which no tag begins")


def _check_places(node: Node, fail: Fail, *, is_last: bool) -> None:
    """Refuse free text that nothing ends: it comes last, or as the content of a tag with an end."""
    kind = node["type"]
    is_endless = kind == "any_text" or (
        kind == "triggered_tags" and not (node["stop_after_first"] and node["at_least_one"])
    )
    if is_endless and not is_last:
        raise fail(
            f"has {kind} that nothing ends; allowed: at the end of all, or any_text as the content "
            "of a tag with an end"
        )
    if kind == "sequence":
        for position, part in enumerate(node["elements"], 1):
            _check_places(part, fail, is_last=is_last and position == len(node["elements"]))
    elif kind in ("or", "optional"):
        for part in node.get("elements", ()) or [node["content"]]:
            _check_places(part, fail, is_last=is_last)
    elif kind in ("plus", "star"):
        _check_places(node["content"], fail, is_last=False)
    elif kind == "tag":
        is_text = node["content"]["type"] == "any_text"
        _check_places(node["content"], fail, is_last=is_text and all(node["end"]))
    for tag in node.get("tags", ()):
        _check_places(tag, fail, is_last=False)


def _says_nothing(key: Any, value: Any) -> bool:
    """Whether a key that is not known asks for nothing: absent, off, or the only style."""
    return value in (None, False, []) or PLAIN_STYLE.get(key) == value
