"""The grammar of an answer that may think, has to call functions, or answers in a form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from attrs import evolve

from quire.constraints import MAX_SCHEMA_DEPTH, GrammarKind, Node, StructuredOutputsParams
from quire.interfaces.answer_parsing import CallForm, ThoughtsForm
from quire.request import SamplingParams
from quire.server.answer_parsing import Parsers
from quire.server.protocol.fields import conflict
from quire.server.protocol.tool_choice import Offered, ToolUse

BLANK = {"type": "regex", "pattern": r"[ \t\r\n]{0,8}"}
ANY_OBJECT = {"type": "object"}
NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
# Keywords of an object that may have properties beside those that it lists itself.
SAYS_MORE = frozenset(
    {
        *("$ref", "$dynamicRef", "additionalProperties", "allOf", "anyOf", "oneOf", "not", "if"),
        *("dependentSchemas", "minProperties", "patternProperties", "propertyNames", "then"),
        *("dependentRequired", "else", "unevaluatedProperties"),
    }
)
OPENAIS_FORMS = ("response_format", "text")


def with_form(
    params: SamplingParams, use: ToolUse, parsers: Parsers, prompt: str
) -> SamplingParams:
    """Return parameters that hold the answer to a prompt to what its tools and form ask for.

    Raises: RequestError, naming `tools`, `stop`, or the field of a form that does not fit.
    """
    form = params.structured_outputs
    calls = None if parsers.tool_call is None else parsers.tool_call.call_form
    thoughts = None if parsers.reasoning is None else parsers.reasoning.thoughts_form(prompt)
    if use.is_forced:
        _check_forced(params, form)
        assert calls is not None, "forced calls are read by a parser with a form"
        tree = _thought_first(_forced(use, calls), thoughts)
    elif form is not None:
        if calls is None and thoughts is None:
            return params
        answer = _node_of(form)
        if form.is_json and (params.stop or params.stop_token_ids):
            raise form.error("asks for JSON, which a stop would cut; leave stop out")
        if calls is not None:
            answer = {"type": "or", "elements": [_forced(use, calls), answer]}
        tree = _thought_first(answer, thoughts)
    elif use.is_strict:
        tree = _text_or_calls(use, calls)
        if thoughts is not None and not thoughts.is_optional:
            # Optional ones are text like that before a call.
            tree = _thought_first(tree, thoughts)
    else:
        return params
    asked_as = "tools" if form is None or use.is_forced else form.asked_as
    tag = {"type": "structural_tag", "format": tree}
    return evolve(
        params,
        structured_outputs=StructuredOutputsParams(structural_tag=tag, asked_as=asked_as),
    )


def _check_forced(params: SamplingParams, form: StructuredOutputsParams | None) -> None:
    if form is not None and form.asked_as not in OPENAIS_FORMS:
        raise conflict(
            form.asked_as, "asks for a form, but tool_choice for a call; leave one of them out"
        )
    for name in ("stop", "stop_token_ids"):
        if getattr(params, name):
            raise conflict(name, "would cut the call that tool_choice asks for; leave it out")


def _text_or_calls(use: ToolUse, form: CallForm | None) -> Node:
    """Return text with calls in it, or either of them. Raises: RequestError."""
    if form is not None and form.trigger is not None:
        return _triggered(use, form)
    if form is not None and form.first_characters:
        rest = {"type": "any_text", "excludes": list(form.excludes)}
        begins = {"type": "regex", "pattern": _other_beginning(form.first_characters)}
        text = {"type": "optional", "content": {"type": "sequence", "elements": [begins, rest]}}
        return {"type": "or", "elements": [_forced(use, form), text]}
    raise conflict(
        "tools",
        "has a strict function, but the server's --tool-call-parser has no mark that begins "
        "a call; set tool_choice to required, or strict to false",
    )


def _other_beginning(characters: str) -> str:
    """Return a regex of white space and a character that is none of some."""
    numbers = "".join(f"\\x{ord(character):02x}" for character in characters)
    return rf"[ \t\r\n]*[^ \t\r\n{numbers}]"


def _forced(use: ToolUse, form: CallForm) -> Node:
    """Return one call or several and nothing else."""
    calls = _list(use, form, [_tag(each, form, use.is_forced) for each in use.functions])
    parts = [_text(form.opening), calls, _text(form.closing)]
    return {"type": "sequence", "elements": [part for part in parts if part is not None]}


def _triggered(use: ToolUse, form: CallForm) -> Node:
    """Return text with calls in it."""
    tags = [_tag(each, form, False) for each in use.functions]
    if form.opening:
        content = _list(use, form, tags)
        tags = [{"type": "tag", "begin": form.opening, "content": content, "end": form.closing}]
    return {
        **{"type": "triggered_tags", "triggers": [form.trigger], "tags": tags},
        **{"stop_after_first": use.is_one_call, "excludes": list(form.excludes)},
    }


def _list(use: ToolUse, form: CallForm, tags: Sequence[Node]) -> Node:
    return {
        **{"type": "tags_with_separator", "tags": list(tags), "separator": form.separator},
        **{"at_least_one": True, "stop_after_first": use.is_one_call},
    }


def _tag(function: Offered, form: CallForm, is_forced: bool) -> Node:
    schema = _arguments(function) if is_forced or function.strict else ANY_OBJECT
    return {
        "type": "tag",
        "begin": form.before_name + function.name + form.after_name,
        "content": {"type": "json_schema", "json_schema": schema},
        "end": list(form.ends),
    }


def _arguments(function: Offered) -> dict[str, Any]:
    """Return the schema of a function's arguments, which are an object. Raises: RequestError."""
    if function.parameters is None:
        return NO_ARGUMENTS
    kind = function.parameters.get("type", "object")
    kinds = kind if isinstance(kind, list) else [kind]
    if "object" not in kinds:
        shown = json.dumps(kind)[:60]
        raise conflict(
            "tools", f"has parameters of type {shown} ({function.name!r}); allowed: object"
        )
    return _closed({**function.parameters, "type": "object"})


def _closed(schema: Any, depth: int = 0) -> Any:
    """Return a schema whose plain objects have the properties that they list and no others.

    That fulfils it too, and a model does not invent arguments. Too deep ones are refused later.
    """
    if not isinstance(schema, dict) or depth > MAX_SCHEMA_DEPTH:
        return schema
    schema = dict(schema)
    properties = schema.get("properties")
    if isinstance(properties, dict):
        schema["properties"] = {name: _closed(part, depth + 1) for name, part in properties.items()}
        if SAYS_MORE.isdisjoint(schema):
            schema["additionalProperties"] = False
    if "items" in schema:
        schema["items"] = _closed(schema["items"], depth + 1)
    return schema


def _thought_first(node: Node, thoughts: ThoughtsForm | None) -> Node:
    """Put thoughts before what an answer has to be."""
    if thoughts is None:
        return node
    text = {"type": "any_text"}
    tag = {"type": "tag", "begin": thoughts.begin, "content": text, "end": thoughts.end}
    first: Node = {"type": "sequence", "elements": [tag, BLANK]}
    if thoughts.is_optional:
        first = {"type": "optional", "content": first}
    return {"type": "sequence", "elements": [first, node]}


def _node_of(form: StructuredOutputsParams) -> Node:
    """Return a form as a part of a tree."""
    source = form.source
    if source.kind is GrammarKind.JSON_SCHEMA:
        return {"type": "json_schema", "json_schema": json.loads(source.text)}
    if source.kind is GrammarKind.JSON_OBJECT:
        return {"type": "json_schema", "json_schema": ANY_OBJECT}
    if source.kind is GrammarKind.REGEX:
        return {"type": "regex", "pattern": source.text}
    if source.kind is GrammarKind.CHOICE:
        texts = [{"type": "const_string", "value": text} for text in source.choices]
        return {"type": "or", "elements": texts}
    if source.kind is GrammarKind.STRUCTURAL_TAG:
        return source.tree
    return {"type": "grammar", "grammar": source.text}


def _text(value: str) -> Node | None:
    return {"type": "const_string", "value": value} if value else None
