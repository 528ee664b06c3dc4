"""Check the messages, tools and extra variables of a chat before a template sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from quire.errors import RequestError
from quire.text.json_files import shorten

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
REFUSED_FIELDS = {"function_call": "use tool_calls", "audio": "this version takes text only"}
RESERVED_VARIABLES = frozenset(
    (
        *("messages", "tools", "add_generation_prompt", "continue_final_message"),
        *("conversation", "chat_template", "tokenize", "return_dict", "template", "kwargs"),
        *("raise_exception", "strftime_now", "namespace", "range", "dict", "self", "loop"),
        *("lipsum", "cycler", "joiner", "caller", "varargs"),
    )
)

MAX_MESSAGES = 16384
MAX_TOOLS = 1024
MAX_VARIABLES = 64
MAX_CHAT_BYTES = 16 * 2**20


def validate_messages(messages: Any) -> list[dict[str, Any]]:
    """Return the messages as plain data for a template.

    As in Transformers, fields that are null are left out and reasoning is found under the names
    that templates read; as in vLLM, the arguments of tool calls given as JSON text are parsed.
    Content that is a list of text parts stays a list: the renderer joins it with line ends, as
    vLLM does, unless the template itself goes through the parts.
    Raises: RequestError for `messages`, naming the first one that is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        raise _wrong("messages", f"is a {type(messages).__name__}; allowed: a list of messages")
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise _wrong("messages", f"has {len(messages)} entries; allowed: 1 to {MAX_MESSAGES}")
    checked = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    _check_plain(checked, "messages")
    return checked


def validate_tools(tools: Any) -> list[dict[str, Any]] | None:
    """Return the tools as plain data. Raises: RequestError for `tools`."""
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise _wrong("tools", f"is a {type(tools).__name__}; allowed: a list of tools")
    if not 0 < len(tools) <= MAX_TOOLS:
        raise _wrong(
            "tools", f"has {len(tools)} entries; allowed: 1 to {MAX_TOOLS}, or leave it out"
        )
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise _wrong(f"tools[{index}]", "needs a function with a name", "tools")
    plain = [dict(tool) for tool in tools]
    _check_plain(plain, "tools")
    return plain


def validate_variables(variables: Any, *, reserved: Sequence[str] = ()) -> dict[str, Any]:
    """Return extra template variables (`chat_template_kwargs`).

    Raises: RequestError for a name that is ours, or a value that is not plain data.
    """
    name = "chat_template_kwargs"
    if variables is None:
        return {}
    if not isinstance(variables, Mapping) or len(variables) > MAX_VARIABLES:
        raise _wrong(name, f"is {shorten(variables)}; allowed: up to {MAX_VARIABLES} names")
    for key in variables:
        if not isinstance(key, str) or not key.isidentifier() or key.startswith("_"):
            raise _wrong(name, f"has the name {shorten(key)}; allowed: plain identifiers")
        if key in RESERVED_VARIABLES or key in reserved:
            raise _wrong(name, f"has the reserved name {shorten(key)}; leave it out")
    plain = dict(variables)
    _check_plain(plain, name)
    return plain


def _wrong(where: str, fact: str, parameter: str | None = None) -> RequestError:
    return RequestError(f"{where} {fact}.", parameter=parameter or where)


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        kind = type(message).__name__
        raise _wrong(where, f"is a {kind}; allowed: objects with role and content", "messages")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        allowed = ", ".join(ROLES)
        raise _wrong(where, f"has the role {shorten(role)}; allowed: {allowed}", "messages")
    plain = {key: value for key, value in message.items() if value is not None}
    for field, remedy in REFUSED_FIELDS.items():
        if field in plain:
            raise _wrong(where, f"has {field}, which is not supported; {remedy}", "messages")
    if not plain.get("tool_calls", True):
        del plain["tool_calls"]
    if "tool_calls" in plain:
        plain["tool_calls"] = _tool_calls(plain["tool_calls"], role, where)
    if "content" in plain:
        plain["content"] = _content(plain["content"], where)
    elif "tool_calls" not in plain:
        raise _wrong(where, "has no content; allowed: text, or null beside tool_calls", "messages")
    return _with_reasoning(plain)


def _content(content: Any, where: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes) or not content:
        fact = f"has content {shorten(content)}; allowed: text, or a list of text parts"
        raise _wrong(where, fact, "messages")
    return [_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)]


def _part(part: Any, where: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        fact = f"has the type {shorten(kind)}; this version takes text parts only"
        raise _wrong(where, fact, "messages")
    text = part.get(TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise _wrong(where, f"has text {shorten(text)}; allowed: a string", "messages")
    return {"type": "text", "text": text}


def _tool_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    if role != "assistant":
        raise _wrong(where, f"has tool_calls but the role {role}; use assistant", "messages")
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)):
        raise _wrong(where, f"has tool_calls {shorten(calls)}; allowed: a list", "messages")
    return [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        raise _wrong(where, "needs a function with a name", "messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments.strip() or "{}")
        except (ValueError, RecursionError) as error:
            raise _wrong(where, "has arguments that are not JSON", "messages") from error
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise _wrong(where, "has arguments that are not a JSON object", "messages")
    return {**call, "function": {**function, "arguments": arguments}}


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give reasoning under the names that templates read, as Transformers does."""
    found = next((message[key] for key in REASONING_FIELDS if key in message), None)
    if found is None:
        return message
    return {"thinking": found, **message, "reasoning_content": found}


def _check_plain(value: Any, parameter: str) -> None:
    """Refuse what JSON cannot carry, half surrogate pairs, and too much of anything."""
    # One by one: nothing else runs in this process while json writes a value.
    parts = value if isinstance(value, list) else [{key: one} for key, one in value.items()]
    try:
        size = sum(
            len(json.dumps(part, ensure_ascii=False, allow_nan=False).encode()) for part in parts
        )
    except UnicodeEncodeError as error:
        raise _wrong(
            parameter, "has half a surrogate pair, which is not a character", parameter
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise _wrong(
            parameter, "has a value that JSON cannot carry (a number must be finite)", parameter
        ) from error
    if size > MAX_CHAT_BYTES:
        raise _wrong(parameter, f"takes {size} bytes; allowed: up to {MAX_CHAT_BYTES}")
