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
        description=f"a Lark grammar of 1 to {MAX_GRAMMAR_CHARS} characters",
    ),
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
    """The form of an answer: any text, any JSON object, or JSON of a schema."""

    type: FormatType
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What vLLM's clients send for any form."""

    json: Schema | None = None
    regex: Regex | None = None
    choice: Choice | None = None
    grammar: Grammar | None = None
    json_object: f.Flag | None = None


class Constrained(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The fields that ask for a form."""

    response_format: ResponseFormat | None = None
    guided_json: Schema | None = None
    guided_regex: Regex | None = None
    guided_choice: Choice | None = None
    guided_grammar: Grammar | None = None
    structured_outputs: StructuredOutputs | None = None

    def forms(self) -> list[dict[str, Any]]:
        """Return the arguments of StructuredOutputsParams for every form that is asked for."""
        found = [
            {name.removeprefix("guided_"): value, "asked_as": name}
            for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
            if (value := getattr(self, name)) is not None
        ]
        if self.structured_outputs is not None:
            found.append(msgspec.structs.asdict(self.structured_outputs))
        if self.response_format is not None:
            given = self.response_format
            schema = None if given.json_schema is None else given.json_schema.schema
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
