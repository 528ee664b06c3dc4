"""Whether a Lark grammar has an answer that ends; what it means is the engine's business."""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r"""\s+|//[^\n]*|\#[^\n]*"""
    r"""|(?P<text>"(?:\\.|[^"\\])*"i?|/(?!/)(?:\\.|[^/\\])+/[a-z]*|<[^>\s]*>)"""
    r"""|(?P<name>[?!]?[A-Za-z_][A-Za-z0-9_-]*)(?P<attributes>\[[^\]]*\])?(?P<colon>\s*:)?"""
    r"""|(?P<mark>->|\.\.|.)""",
    re.VERBOSE | re.DOTALL,
)
MAX_NESTING = 64

Item = tuple[str, str]


def check_lark(text: str) -> None:
    """Refuse a grammar whose rule `start` never ends. Raises: ValueError.

    Grammars with what is not understood here (`%` lines, `@` names) are left to the engine.
    """
    if re.search(r"^\s*%|@|\{\d|~", text, re.MULTILINE):
        return
    rules = _rules(text)
    ending: set[str] = set()
    while True:
        more = {name for name, body in rules.items() if _Body(body, rules, ending).ends()}
        if more == ending:
            break
        ending = more
    if "start" in rules and "start" not in ending:
        raise ValueError("rule 'start' never ends: every alternative contains itself")


def _rules(text: str) -> dict[str, list[Item]]:
    rules: dict[str, list[Item]] = {}
    body: list[Item] = []
    for found in _TOKEN.finditer(text):
        if found["name"] and found["colon"]:
            body = rules.setdefault(found["name"].lstrip("?!"), [])
            if body:  # declared twice: the engine says so
                body.append(("mark", "|"))
        elif found["name"]:
            body.append(("name", found["name"]))
        elif found["text"]:
            body.append(("text", found["text"]))
        elif found["mark"]:
            body.append(("mark", found["mark"]))
    return rules


class _Body:
    """The alternatives of one rule, read from left to right."""

    def __init__(self, items: list[Item], rules: dict[str, list[Item]], ending: set[str]) -> None:
        self._items = items
        self._rules = rules
        self._ending = ending
        self._at = 0

    def ends(self, depth: int = 0) -> bool:
        """Whether any alternative up to the closing bracket has parts that all end."""
        any_ends, all_end = False, True
        while self._at < len(self._items) and depth < MAX_NESTING:
            kind, text = self._items[self._at]
            self._at += 1
            if (kind, text) in (("mark", ")"), ("mark", "]")):
                break
            if (kind, text) == ("mark", "|"):
                any_ends, all_end = any_ends or all_end, True
            elif (kind, text) == ("mark", "->"):
                self._at += 1  # the alternative's other name
            else:
                all_end = self._part_ends(kind, text, depth) and all_end
        return any_ends or all_end

    def _part_ends(self, kind: str, text: str, depth: int) -> bool:
        ends = True
        if (kind, text) == ("mark", "("):
            ends = self.ends(depth + 1)
        elif (kind, text) == ("mark", "["):
            self.ends(depth + 1)  # may be left out
        elif kind == "name":
            ends = text not in self._rules or text in self._ending
        if self._at < len(self._items) and self._items[self._at] in (
            ("mark", "?"),
            ("mark", "*"),
        ):
            self._at += 1
            return True
        return ends
