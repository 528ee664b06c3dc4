"""The body of `POST /v1/responses`, and the conversation that it stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from quire.server.protocol import fields as f
from quire.server.protocol.chat import check_tools, told_of
from quire.server.protocol.generation import GenerationBody, conflict
from quire.server.protocol.structured import FormatType, SchemaObject, form_of
from quire.server.protocol.tool_choice import FlatToolChoice, ToolUse, tool_use


class ResponsePart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A piece of text, of the user's or of an earlier answer."""

    type: Annotated[
        Literal["input_text", "output_text", "reasoning_text"],
        Meta(description="input_text, output_text, reasoning_text; this version takes no others"),
    ]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputItem(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A message, thoughts, a call, or what a function gave; without a type, a message."""

    type: Annotated[
        Literal["message", "reasoning", "function_call", "function_call_output"],
        Meta(description="message, reasoning, function_call, function_call_output"),
    ] = "message"
    role: (
        Annotated[
            Literal["system", "developer", "user", "assistant"],
            Meta(description="system, developer, user, assistant"),
        ]
        | None
    ) = None
    content: str | list[ResponsePart] | None = None
    id: str | None = None
    status: str | None = None
    phase: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ResponsePart] | None = None
    summary: list[Any] | None = None
    encrypted_content: f.Refused = None


class FlatTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function that the model may call."""

    type: Annotated[Literal["function"], Meta(description="function; others are not supported")]
    name: f.FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: f.Flag | None = None


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The form of an answer."""

    type: FormatType
    name: f.FunctionName | None = None
    schema: SchemaObject | None = None
    strict: f.Flag | None = None
    description: str | None = None


class TextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How an answer is written."""

    format: TextFormat | None = None
    verbosity: f.Ignored | None = None


Input = Annotated[
    Annotated[str, Meta(min_length=1)]
    | Annotated[list[InputItem], Meta(min_length=1, max_length=f.MAX_MESSAGES)],
    Meta(description=f"a text, or a list of 1 to {f.MAX_MESSAGES} items; not empty"),
]
FlatTools = Annotated[
    list[FlatTool], Meta(max_length=f.MAX_TOOLS, description=f"up to {f.MAX_TOOLS} functions")
]


class ResponsesRequest(
    GenerationBody, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A text or a conversation to be answered."""

    input: Input
    instructions: str | None = None
    max_output_tokens: f.Count | None = None
    top_logprobs: f.NumLogprobs | None = None
    tools: FlatTools | None = None
    tool_choice: FlatToolChoice | None = None
    text: TextOptions | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None

    reasoning: (
        Annotated[dict[str, Any], Meta(description="an object; it changes nothing")] | None
    ) = None
    parallel_tool_calls: f.Flag | None = None

    response_format: f.Refused = None
    prompt_logprobs: f.Refused = None
    use_beam_search: Literal[False] | None = None
    length_penalty: f.Refused = None
    early_stopping: f.Refused = None
    previous_response_id: f.Refused = None
    conversation: f.Refused = None
    max_tool_calls: f.Refused = None
    prompt: f.Refused = None
    access_programs: f.Refused = None
    background_options: f.Refused = None
    context_management: f.Refused = None
    image: f.Refused = None

    @property
    def num_logprobs(self) -> int | None:
        """The log-probabilities asked for: by their number, or by `include`."""
        return self.top_logprobs if self.top_logprobs or not self.include else 0

    def length_limit(self) -> tuple[str, int | None]:
        """Return `max_output_tokens`."""
        return "max_output_tokens", self.max_output_tokens

    def tool_use(self) -> ToolUse:
        """Return what the answer may call, or must. Raises: RequestError."""
        functions = self.tools or ()
        check_tools(functions)
        return tool_use(self.tool_choice, functions, parallel=self.parallel_tool_calls)

    def forms(self) -> list[dict[str, Any]]:
        """Return the forms that the body asks for, `text.format` among them."""
        given = None if self.text is None else self.text.format
        if given is None:
            return super().forms()
        return super().forms() + form_of(given.type, given.schema, asked_as="text")

    def check(self) -> None:
        """Refuse fields that do not fit together. Raises: RequestError."""
        super().check()
        to_messages(self)


def to_chat_tools(request: ResponsesRequest) -> list[dict[str, Any]] | None:
    """Return the tools in the form that chat templates read."""
    if not request.tools or request.tool_choice == "none":
        return None
    check_tools(request.tools)
    tools = []
    for tool in request.tools:
        function = told_of(tool)
        tools.append({"type": function.pop("type"), "function": function})
    return tools


def to_messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the conversation as chat messages. Raises: RequestError, naming `input`.

    Calls that stand together, and those after the assistant's text, become one message.
    """
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for position, item in enumerate(request.input):
        where = f"input[{position}]"
        if item.type == "function_call":
            _add_call(messages, item, where)
        elif item.type == "function_call_output":
            messages.append(_output(item, where))
        elif item.type == "reasoning":
            messages.append(_thoughts(item, where))
        else:
            _add_message(messages, _message(item, where))
    return messages


def _message(item: InputItem, where: str) -> dict[str, Any]:
    role = _required(item.role, f"{where}.role")
    return {"role": role, "content": _text(_required(item.content, f"{where}.content"))}


def _thoughts(item: InputItem, where: str) -> dict[str, Any]:
    """Return what an assistant thought before its text or its calls, which are added to it."""
    content = _required(item.content, f"{where}.content")
    parts = [content] if isinstance(content, str) else [part.text for part in content]
    return {"role": "assistant", "content": "", "reasoning_content": "".join(parts)}


def _add_message(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    is_assistant = message["role"] == "assistant" and bool(messages)
    if is_assistant and "reasoning_content" in messages[-1] and not messages[-1]["content"]:
        messages[-1]["content"] = message["content"]
    else:
        messages.append(message)


def _add_call(messages: list[dict[str, Any]], item: InputItem, where: str) -> None:
    call = {
        "id": _required(item.call_id, f"{where}.call_id"),
        "type": "function",
        "function": {
            "name": _required(item.name or None, f"{where}.name"),
            "arguments": _required(item.arguments, f"{where}.arguments"),
        },
    }
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append(call)


def _output(item: InputItem, where: str) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": _required(item.call_id, f"{where}.call_id"),
        "content": _text(_required(item.output, f"{where}.output")),
    }


def _text(content: str | list[ResponsePart]) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    return [{"type": "text", "text": part.text} for part in content]


def _required(value: Any, where: str) -> Any:
    if value is None:
        error = conflict(where, "is missing; it is required")
        error.parameter = "input"
        raise error
    return value
