"""The form that a body asks for: OpenAI's `response_format`, vLLM's `guided_*` fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from quire.constraints import MAX_CHOICES, MAX_GRAMMAR_CHARS, MAX_REGEX_CHARS
from quire.errors import RequestError
from quire.server.protocol import fields as f

FormatType = Annotated[
    Literal["text", "json_object", "json_schema"],
    Meta(description="text, json_object, json_schema"),
]
ResponseFormatType = Annotated[
    Literal["text", "json_object", "json_schema", "structural_tag"],
    Meta(description="text, json_object, json_schema, structural_tag"),
]
SchemaObject = Annotated[dict[str, Any], Meta(description="a JSON schema, as an object")]
Schema = Annotated[
    dict[str, Any] | bool | str, Meta(description="a JSON schema, as an object or a text")
]
Regex = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_REGEX_CHARS,
        description=f"a regex of 1 to {MAX_REGEX_CHARS} characters",
    ),
]
Choice = Annotated[
    list[Annotated[str, Meta(min_length=1)]],
    Meta(
        min_length=1,
        max_length=MAX_CHOICES,
        description=f"a list of 1 to {MAX_CHOICES} texts that are not empty",
    ),
]
Grammar = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_GRAMMAR_CHARS,
        description=f"a Lark or GBNF grammar of 1 to {MAX_GRAMMAR_CHARS} characters",
    ),
]
StructuralTag = Annotated[
    dict[str, Any] | str,
    Meta(description="structures and triggers, or a format, as an object or a text"),
]


class JsonSchemaFormat(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A JSON schema with OpenAI's beside it; it is enforced whether `strict` is true or not."""

    name: f.FunctionName
    schema: SchemaObject
    description: str | None = None
    strict: f.Flag | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The form of an answer: any text, any JSON object, JSON of a schema, or text with tags."""

    type: ResponseFormatType
    json_schema: JsonSchemaFormat | None = None
    structures: Annotated[list[Any], Meta(description="a list of begin, schema, end")] | None = None
    triggers: Annotated[list[str], Meta(description="a list of texts")] | None = None
    format: Annotated[dict[str, Any], Meta(description="a format, as an object")] | None = None

    def tag_fields(self) -> dict[str, Any]:
        """Return the fields of a structural tag that are given."""
        given = {name: getattr(self, name) for name in ("structures", "triggers", "format")}
        return {name: value for name, value in given.items() if value is not None}


class StructuredOutputs(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What vLLM's clients send for any form."""

    json: Schema | None = None
    regex: Regex | None = None
    choice: Choice | None = None
    grammar: Grammar | None = None
    json_object: f.Flag | None = None
    structural_tag: StructuralTag | None = None


class Constrained(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields that ask for a form."""

    response_format: ResponseFormat | None = None
    guided_json: Schema | None = None
    guided_regex: Regex | None = None
    guided_choice: Choice | None = None
    guided_grammar: Grammar | None = None
    structural_tag: StructuralTag | None = None
    structured_outputs: StructuredOutputs | None = None

    def forms(self) -> list[dict[str, Any]]:
        """Return the arguments of StructuredOutputsParams for every form that is asked for."""
        found = [
            {name.removeprefix("guided_"): value, "asked_as": name}
            for name in GUIDED
            if (value := getattr(self, name)) is not None
        ]
        if self.structured_outputs is not None:
            found.append(msgspec.structs.asdict(self.structured_outputs))
        if self.response_format is not None:
            given = self.response_format
            if given.type == "structural_tag":
                return [*found, _tag_form(given)]
            schema = None if given.json_schema is None else given.json_schema.schema
            if given.tag_fields():
                raise RequestError(
                    f"response_format has {next(iter(given.tag_fields()))}, which does not fit "
                    f"its type, {given.type}.",
                    parameter="response_format",
                )
            found += form_of(given.type, schema, asked_as="response_format")
        return found

    def form(self) -> dict[str, Any] | None:
        """Return the one form that is asked for, None without any. Raises: RequestError."""
        found = self.forms()
        if len(found) > 1:
            names = [form.get("asked_as", "structured_outputs") for form in found]
            raise RequestError(
                f"{names[-1]} and {names[0]} both ask for a form; give one of them.",
                parameter=names[-1],
            )
        return found[0] if found else None


GUIDED = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structural_tag")


def _tag_form(given: ResponseFormat) -> dict[str, Any]:
    if given.json_schema is not None:
        raise RequestError(
            "response_format has a schema, which does not fit its type, structural_tag.",
            parameter="response_format",
        )
    tag = {"type": "structural_tag", **given.tag_fields()}
    return {"structural_tag": tag, "asked_as": "response_format"}


def form_of(kind: str, schema: dict[str, Any] | None, *, asked_as: str) -> list[dict[str, Any]]:
    """Return the form that OpenAI's clients ask for, none for text. Raises: RequestError."""
    if (schema is not None) != (kind == "json_schema"):
        has = "no schema" if schema is None else "a schema"
        raise RequestError(
            f"{asked_as} has {has}, which does not fit its type, {kind}.", parameter=asked_as
        )
    if schema is not None:
        return [{"json": schema, "asked_as": asked_as}]
    return [{"json_object": True, "asked_as": asked_as}] if kind == "json_object" else []
