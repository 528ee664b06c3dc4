"""The body of `POST /v1/chat/completions`. What messages may hold together, quire.text checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from quire.server.protocol import fields as f
from quire.server.protocol.generation import GenerationBody, check_size, conflict
from quire.server.protocol.tool_choice import Offered, ToolChoice, ToolUse, tool_use

Content = Meta(description="a text, or a list of parts of type text")


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A piece of a message's content; this version takes text only."""

    type: Annotated[Literal["text"], Meta(description="text; this version takes no other parts")]
    text: str


class FunctionCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function that an earlier answer called; its arguments are JSON in a text."""

    name: f.Name
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call in an earlier answer."""

    id: str
    function: FunctionCall
    type: Annotated[Literal["function"], Meta(description="function")] = "function"
    index: int | msgspec.UnsetType = msgspec.UNSET


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message. Answers of OpenAI's clients may be sent back as they came."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool"],
        Meta(description="system, developer, user, assistant, tool"),
    ]
    content: Annotated[str | list[TextPart] | None, Content] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    function_call: f.Refused = None
    audio: f.Refused = None


class Function(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a template is told of a function."""

    name: f.FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: f.Flag | None = None


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A function that the model may call."""

    type: Annotated[Literal["function"], Meta(description="function")]
    function: Function


Messages = Annotated[
    list[Message],
    Meta(
        min_length=1,
        max_length=f.MAX_MESSAGES,
        description=f"a list of 1 to {f.MAX_MESSAGES} messages",
    ),
]
Tools = Annotated[
    list[Tool],
    Meta(
        min_length=1, max_length=f.MAX_TOOLS, description=f"a list of 1 to {f.MAX_TOOLS} functions"
    ),
]
TemplateVariables = Annotated[
    dict[str, Any], Meta(max_length=64, description="an object of up to 64 variables")
]


class Templated:
    """What bodies with a conversation share; `messages` gives it as plain data."""

    __slots__ = ()

    if TYPE_CHECKING:
        given_messages: list[Message] | None
        tools: list[Tool] | None
        add_generation_prompt: bool | None
        continue_final_message: bool | None
        chat_template_kwargs: dict[str, Any] | None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages as plain data."""
        found: list[dict[str, Any]] = msgspec.to_builtins(self.given_messages or [])
        return found

    def template_options(self) -> dict[str, Any]:
        """Return what the template is told beside the messages."""
        continues = bool(self.continue_final_message)
        adds = self.add_generation_prompt
        check_size("chat_template_kwargs", self.chat_template_kwargs)
        return {
            "tools": None if self.tools is None else self._tools(self.tools),
            "add_generation_prompt": not continues if adds is None else adds,
            "continue_final_message": continues,
            "kwargs": self.chat_template_kwargs,
        }

    @staticmethod
    def _tools(tools: list[Tool]) -> list[dict[str, Any]]:
        check_tools([tool.function for tool in tools])
        return [{"type": tool.type, "function": told_of(tool.function)} for tool in tools]


def check_tools(functions: Sequence[Offered]) -> None:
    """Refuse functions of one name, and schemas too large. Raises: RequestError."""
    check_size("tools", [function.parameters for function in functions])
    first: dict[str, int] = {}
    for position, function in enumerate(functions):
        other = first.setdefault(function.name, position)
        if other != position:
            fact = f"names {function.name!r} at {other} and at {position}; name a function once"
            raise conflict("tools", fact)
        size = len(msgspec.json.encode(function.parameters))
        if size > f.MAX_SCHEMA_BYTES:
            raise conflict(
                "tools",
                f"has parameters of {size} bytes at {position} ({function.name!r}); "
                f"allowed: up to {f.MAX_SCHEMA_BYTES}",
            )


def told_of(function: msgspec.Struct) -> dict[str, Any]:
    """Return what a template is told of a function: not how its arguments are enforced."""
    return {k: v for k, v in given_fields(function).items() if k != "strict"}


def given_fields(part: msgspec.Struct) -> dict[str, Any]:
    """Return a struct's fields that are not null, without copying what they hold."""
    return {k: v for k, v in msgspec.structs.asdict(part).items() if v is not None}


class Conversation(
    Templated, msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """What a chat template is given."""

    given_messages: Messages | None = msgspec.field(default=None, name="messages")
    tools: Tools | None = None
    add_generation_prompt: f.Flag | None = None
    continue_final_message: f.Flag | None = None
    chat_template_kwargs: TemplateVariables | None = None
    chat_template: f.Refused = None
    documents: f.Refused = None
    mm_processor_kwargs: f.Refused = None


class ChatCompletionRequest(
    Templated, GenerationBody, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A conversation to be continued."""

    given_messages: Messages = msgspec.field(name="messages")
    tools: Tools | None = None
    add_generation_prompt: f.Flag | None = None
    continue_final_message: f.Flag | None = None
    chat_template_kwargs: TemplateVariables | None = None
    chat_template: f.Refused = None
    documents: f.Refused = None
    mm_processor_kwargs: f.Refused = None
    n: f.Choices | None = None
    best_of: f.Choices | None = None
    max_tokens: f.Count | None = None
    max_completion_tokens: f.Count | None = None
    logprobs: f.Flag | None = None
    top_logprobs: f.NumLogprobs | None = None
    tool_choice: ToolChoice | None = None
    add_special_tokens: Literal[False] | None = None

    parallel_tool_calls: f.Flag | None = None
    verbosity: f.Ignored | None = None
    reasoning_effort: f.Ignored | None = None
    modalities: list[Literal["text"]] | None = None

    functions: f.Refused = None
    function_call: f.Refused = None
    audio: f.Refused = None
    prediction: f.Refused = None
    web_search_options: f.Refused = None

    @property
    def num_logprobs(self) -> int | None:
        """The log-probabilities asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def length_limit(self) -> tuple[str, int | None]:
        """Return the newer field where both are given."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    def check(self) -> None:
        """Refuse fields that do not fit together. Raises: RequestError."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "needs logprobs; set logprobs to true")
        if self.max_tokens is not None and self.length_limit()[1] != self.max_tokens:
            raise conflict("max_completion_tokens", "differs from max_tokens; give one of them")
        if self.tool_choice == "auto" and self.tools is None:
            raise conflict("tool_choice", "needs tools; give some or leave it out")
        self.check_best_of(self.best_of, self.n)

    def tool_use(self) -> ToolUse:
        """Return what the answer may call, or must. Raises: RequestError."""
        functions = [tool.function for tool in self.tools or ()]
        check_tools(functions)
        return tool_use(self.tool_choice, functions, parallel=self.parallel_tool_calls)

    def template_options(self) -> dict[str, Any]:
        """Return what the template is told; tools that may not be called are left out."""
        options = super().template_options()
        return options | ({"tools": None} if self.tool_choice == "none" else {})
