"""Which functions an answer may or must call: `tool_choice` in both spellings of OpenAI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol

import msgspec
from attrs import frozen
from msgspec import Meta

from quire.server.protocol import fields as f
from quire.server.protocol.fields import conflict

Word = Literal["none", "auto", "required"]


class NamedFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The function that is to be called."""

    name: f.FunctionName


class NamedTool(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"
):
    """Chat's way to force a function."""

    function: NamedFunction


class FlatNamedTool(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="function"
):
    """The Responses API's way to force a function."""

    name: f.FunctionName


ToolChoice = Annotated[
    Word | NamedTool,
    Meta(
        description='none, auto, required, {"type": "function", "function": {"name": NAME}}',
    ),
]
FlatToolChoice = Annotated[
    Word | FlatNamedTool,
    Meta(description='none, auto, required, {"type": "function", "name": NAME}'),
]


class Offered(Protocol):
    """A function on offer, however a body spells it."""

    name: str
    parameters: dict[str, Any] | None
    strict: bool | None


@frozen(kw_only=True)
class ToolUse:
    """What an answer may call: `functions`, of which it calls some at will, or at least one.

    `is_forced` says that it has to call; `is_named` that one function was named.
    """

    functions: Sequence[Offered] = ()
    is_forced: bool = False
    is_named: bool = False
    is_one_call: bool = False

    @property
    def names(self) -> list[str]:
        """The functions' names."""
        return [function.name for function in self.functions]

    @property
    def is_strict(self) -> bool:
        """Whether any function's arguments have to fulfil its schema."""
        return any(function.strict for function in self.functions)


def tool_use(
    choice: Word | NamedTool | FlatNamedTool | None,
    functions: Sequence[Offered],
    *,
    parallel: bool | None,
) -> ToolUse:
    """Return what an answer may call. Raises: RequestError, naming `tool_choice` or `tools`."""
    if choice == "required" and not functions:
        raise conflict("tool_choice", "is required and needs tools; give some or leave it out")
    if choice == "none":
        return ToolUse()
    if isinstance(choice, (NamedTool, FlatNamedTool)):
        name = choice.function.name if isinstance(choice, NamedTool) else choice.name
        return _named(name, functions)
    return ToolUse(
        functions=functions, is_forced=choice == "required", is_one_call=parallel is False
    )


def _named(name: str, functions: Sequence[Offered]) -> ToolUse:
    found = [function for function in functions if function.name == name]
    if not found:
        names = ", ".join(function.name for function in functions[:8])
        more = f" and {len(functions) - 8} more" if len(functions) > 8 else ""
        allowed = f"allowed: {names}{more}" if functions else "there are no tools"
        raise conflict("tool_choice", f"names {name!r}, which is none of the tools; {allowed}")
    return ToolUse(functions=found[:1], is_forced=True, is_named=True, is_one_call=True)
