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


class Allowed(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Some of the tools, and whether one of them has to be called."""

    mode: Annotated[Literal["auto", "required"], Meta(description="auto, required")]
    tools: Annotated[list[NamedTool], Meta(min_length=1, max_length=f.MAX_TOOLS)]


class AllowedTools(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"
):
    """Chat's way to leave only some of the tools to be called."""

    allowed_tools: Allowed

    @property
    def mode(self) -> str:
        """Whether one has to be called."""
        return self.allowed_tools.mode

    def names(self) -> list[str]:
        """Return the functions' names."""
        return [tool.function.name for tool in self.allowed_tools.tools]


class FlatAllowedTools(
    msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="allowed_tools"
):
    """The Responses API's way to leave only some of the tools to be called."""

    mode: Annotated[Literal["auto", "required"], Meta(description="auto, required")]
    tools: Annotated[list[FlatNamedTool], Meta(min_length=1, max_length=f.MAX_TOOLS)]

    def names(self) -> list[str]:
        """Return the functions' names."""
        return [tool.name for tool in self.tools]


ToolChoice = Annotated[
    Word | NamedTool | AllowedTools,
    Meta(
        description='none, auto, required, {"type": "function", "function": {"name": NAME}}, '
        "an object of type allowed_tools",
    ),
]
FlatToolChoice = Annotated[
    Word | FlatNamedTool | FlatAllowedTools,
    Meta(
        description='none, auto, required, {"type": "function", "name": NAME}, '
        "an object of type allowed_tools"
    ),
]
Choice = Word | NamedTool | FlatNamedTool | AllowedTools | FlatAllowedTools


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
    choice: Choice | None,
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
        found = _chosen([name], functions)
        return ToolUse(functions=found, is_forced=True, is_named=True, is_one_call=True)
    mode: str | None = None if choice is None or isinstance(choice, str) else choice.mode
    if choice is not None and not isinstance(choice, str):
        functions = _chosen(choice.names(), functions)
    return ToolUse(
        functions=functions,
        is_forced=(mode or choice) == "required",
        is_one_call=parallel is False,
    )


def _chosen(names: Sequence[str], functions: Sequence[Offered]) -> list[Offered]:
    """Return the functions of some names. Raises: RequestError for one that is not there."""
    known = {function.name: function for function in functions}
    for name in names:
        if name in known:
            continue
        shown = ", ".join(list(known)[:8])
        more = f" and {len(known) - 8} more" if len(known) > 8 else ""
        allowed = f"allowed: {shown}{more}" if known else "there are no tools"
        raise conflict("tool_choice", f"names {name!r}, which is none of the tools; {allowed}")
    return [known[name] for name in dict.fromkeys(names)]
