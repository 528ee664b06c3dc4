"""What form an answer must have: JSON, a regex, a choice, a grammar, or text with tags in it.

Bounds come before work: what passes here is small enough to be handed to a grammar engine.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import field, fields, frozen

from quire.errors import RequestError
from quire.structural_tags import Node as Node
from quire.structural_tags import nodes_of, read_structural_tag

MAX_GRAMMAR_CHARS = 2**18
MAX_REGEX_CHARS = 2**13
MAX_CHOICES = 4096
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_VALUES = 2**15


class GrammarKind(enum.StrEnum):
    """Which language a `GrammarSource` is written in."""

    JSON_SCHEMA = "json"
    JSON_OBJECT = "json_object"
    REGEX = "regex"
    CHOICE = "choice"
    LARK = "grammar"
    GBNF = "gbnf"
    STRUCTURAL_TAG = "structural_tag"


@frozen(kw_only=True)
class GrammarSource:
    """A grammar as text, equal where its content is: what engines compile and caches key by.

    `text` is a JSON schema, empty for any JSON object, a regex that the whole answer matches, a
    JSON list of texts of which the answer is one, a Lark grammar whose first rule is `start`, a
    GBNF grammar whose first rule is `root`, or a structural tag as JSON, checked and complete.
    """

    kind: GrammarKind
    text: str

    @classmethod
    def of_grammar(cls, text: str) -> GrammarSource:
        """Return a grammar's source: GBNF where a line begins with a rule and `::=`, else Lark."""
        is_gbnf = _GBNF_RULE.search(text) is not None
        return cls(kind=GrammarKind.GBNF if is_gbnf else GrammarKind.LARK, text=text)

    @property
    def choices(self) -> list[str]:
        """The texts of a choice."""
        found: list[str] = json.loads(self.text)
        return found

    @property
    def tree(self) -> Node:
        """The tree of a structural tag, as `quire.structural_tags` completes it."""
        found: Node = json.loads(self.text)["format"]
        return found


@frozen(kw_only=True)
class StructuredOutputsParams:
    """Ask for one form of the answer; exactly one field is given.

    `json` is a schema as a mapping, a boolean or JSON text, and is kept as text; `grammar` is
    Lark, or GBNF where a rule is written with `::=`; `structural_tag` is a mapping or JSON text
    and is kept as text. `asked_as` is the field that errors name.
    Source: names of vLLM's class.
    Raises: RequestError.
    """

    json: Any = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None
    asked_as: str = field(default="structured_outputs")

    def __attrs_post_init__(self) -> None:
        """Check that one thing is asked for, within bounds."""
        if self.json_object is not None and not isinstance(self.json_object, bool):
            raise self.error("json_object is true or absent")
        given = [name for name in FORMS if getattr(self, name) not in (None, False)]
        if self.json is False:
            given.append("json")
        if len(given) != 1:
            what = f"has {' and '.join(given)}" if given else "has no form"
            raise self.error(f"{what}; give exactly one of {', '.join(FORMS)}")
        # What was given may be changed later, and is not kept.
        if self.json is not None:
            object.__setattr__(self, "json", self._schema_text())
        elif self.choice is not None:
            object.__setattr__(self, "choice", self._checked_choices())
        elif self.regex is not None:
            self._text(self.regex, "regex", MAX_REGEX_CHARS)
        elif self.grammar is not None:
            self._text(self.grammar, "grammar", MAX_GRAMMAR_CHARS)
        elif self.structural_tag is not None:
            object.__setattr__(self, "structural_tag", self._tag_text())

    def error(self, fact: str) -> RequestError:
        """Return the error of a constraint, naming the field that asked for it."""
        return RequestError(f"{self.asked_as} {fact}.", parameter=self.asked_as)

    @property
    def is_json(self) -> bool:
        """Whether the answer is JSON, which a stop string would cut."""
        return self.source.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.JSON_OBJECT)

    @property
    def source(self) -> GrammarSource:
        """The grammar as a text."""
        if self.json is not None:
            return GrammarSource(kind=GrammarKind.JSON_SCHEMA, text=self.json)
        if self.regex is not None:
            return GrammarSource(kind=GrammarKind.REGEX, text=self.regex)
        if self.grammar is not None:
            return GrammarSource.of_grammar(self.grammar)
        if self.structural_tag is not None:
            return GrammarSource(kind=GrammarKind.STRUCTURAL_TAG, text=self.structural_tag)
        if self.choice is not None:
            return GrammarSource(kind=GrammarKind.CHOICE, text=json.dumps(self.choice))
        return GrammarSource(kind=GrammarKind.JSON_OBJECT, text="")

    def _text(self, value: Any, what: str, most: int) -> str:
        if not isinstance(value, str) or not value:
            raise self.error(f"has a {what} that is no text, or an empty one; give a text")
        if len(value) > most:
            raise self.error(
                f"has a {what} of {len(value)} characters; allowed: up to {most} characters"
            )
        if "\0" in value:
            raise self.error(f"has a {what} with the character NUL; leave it out")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(f"has a {what} with half a surrogate pair; send Unicode") from None
        return value

    def _schema_text(self) -> str:
        if isinstance(self.json, str):
            given = self._text(self.json, "schema", MAX_GRAMMAR_CHARS)
            try:
                schema = json.loads(given)
            except (ValueError, RecursionError) as error:
                raise self.error(f"has a schema that is no JSON: {str(error)[:80]}") from None
        else:
            schema = self.json
        if not isinstance(schema, (Mapping, bool)):
            raise self.error("has a schema that is neither an object nor true or false")
        self._check_depth(schema)
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise self.error(f"has a schema that is no JSON: {str(error)[:80]}") from None
        return self._text(text, "schema", MAX_GRAMMAR_CHARS)

    def _tag_text(self) -> str:
        tree = read_structural_tag(self.structural_tag, self.error)
        for node in nodes_of(tree):
            self._check_depth(node.get("json_schema"))
        try:
            text = json.dumps({"type": "structural_tag", "format": tree}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise self.error(f"has a schema that is no JSON: {str(error)[:80]}") from None
        return self._text(text, "structural tag", MAX_GRAMMAR_CHARS)

    def _check_depth(self, schema: Any) -> None:
        """Walk without recursion, so that no nesting can exhaust the stack."""
        level, depth, count = [schema], 0, 0
        while level:
            depth += 1
            count += len(level)
            if depth > MAX_SCHEMA_DEPTH:
                raise self.error(
                    f"has a schema nested deeper than allowed: up to {MAX_SCHEMA_DEPTH} levels"
                )
            if count > MAX_SCHEMA_VALUES:
                raise self.error(
                    f"has a schema of too many values; allowed: up to {MAX_SCHEMA_VALUES}"
                )
            inner: list[Any] = []
            for value in level:
                if isinstance(value, Mapping):
                    inner.extend(value.values())
                elif isinstance(value, (list, tuple)):
                    inner.extend(value)
            level = inner

    def _checked_choices(self) -> tuple[str, ...]:
        choices, allowed = self.choice, f"1 to {MAX_CHOICES} texts that are not empty"
        if not isinstance(choices, (list, tuple)) or not 0 < len(choices) <= MAX_CHOICES:
            raise self.error(f"has a choice that is not allowed; give {allowed}")
        for text in choices:
            if not isinstance(text, str) or not text:
                raise self.error(f"has a choice that is not allowed; give {allowed}")
            self._text(text, "choice", MAX_GRAMMAR_CHARS)
        self._text(json.dumps(choices), "choice", MAX_GRAMMAR_CHARS)
        return tuple(choices)


FORMS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_GBNF_RULE = re.compile(r"^[ \t]*[A-Za-z0-9_-]+[ \t]*::=", re.MULTILINE)
_NAMES = {a.name for a in fields(StructuredOutputsParams)}


def to_structured_outputs(value: Any) -> Any:
    """Return what `SamplingParams.structured_outputs` keeps of what was given.

    Raises: RequestError for a mapping with other names.
    """
    if value is None or isinstance(value, StructuredOutputsParams):
        return value
    if not isinstance(value, Mapping):
        raise RequestError(
            f"structured_outputs is a {type(value).__name__}; allowed: StructuredOutputsParams "
            f"or a mapping with one of {', '.join(FORMS)}.",
            parameter="structured_outputs",
        )
    unknown = [str(name)[:60] for name in value if name not in _NAMES]
    if unknown:
        raise RequestError(
            f"structured_outputs has {unknown[0]!r}; allowed: one of {', '.join(FORMS)}.",
            parameter="structured_outputs",
        )
    return StructuredOutputsParams(**value)
