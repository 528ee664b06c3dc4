"""Render a conversation with a checkpoint's chat template, with Transformers' results.

Rendering happens in a child process (template_worker.py) with limits on time, memory and output:
neither a thread nor a signal can stop a template that builds gigabytes or never returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quire.errors import ConfigError, RequestError
from quire.text.json_files import read_optional_json_object, read_text, wrong_value
from quire.text.messages import validate_messages, validate_tools, validate_variables
from quire.text.template_process import TemplateLimits, TemplatePool, TemplateStopped
from quire.text.tokenizer_files import CONFIG_FILE

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"
DEFAULT = "default"
WITH_TOOLS = "tool_use"
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
MAX_TEMPLATE_CHARS = 2**20

PROBE_USER = {"role": "user", "content": "hi"}
PROBE_SYSTEM = {"role": "system", "content": "You are helpful."}
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}


class ChatTemplate:
    """One checkpoint's templates. `render` may be called from any thread.

    `origin` says in errors where the template comes from: a file, or a file and its key.
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        *,
        origin: str,
        special_tokens: Mapping[str, str],
        limits: TemplateLimits | None = None,
    ) -> None:
        if any(len(source) > MAX_TEMPLATE_CHARS for source in templates.values()):
            raise ConfigError(f"{origin}: longer than {MAX_TEMPLATE_CHARS} characters.")
        self.origin = origin
        self.templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._limits = limits or TemplateLimits()
        self._pool = TemplatePool(self.templates, self._limits)

    @classmethod
    def from_folder(cls, folder: Path, *, special_tokens: Mapping[str, str]) -> ChatTemplate | None:
        """Read a checkpoint's templates; None where it has none.

        chat_template.jinja and additional_chat_templates/ come before tokenizer_config.json.
        Raises: ConfigError, naming file and key.
        """
        folder = Path(folder)
        files = {p.stem: p for p in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
        if (folder / TEMPLATE_FILE).is_file():
            files[DEFAULT] = folder / TEMPLATE_FILE
        if files:
            templates = {name: read_text(path) for name, path in files.items()}
            origin = str(files.get(DEFAULT, folder / TEMPLATE_FOLDER))
        else:
            templates = _configured_templates(folder / CONFIG_FILE)
            origin = f"{folder / CONFIG_FILE}: chat_template"
        if not templates:
            return None
        return cls(templates, origin=origin, special_tokens=special_tokens)

    @classmethod
    def from_file(cls, path: Path, *, special_tokens: Mapping[str, str]) -> ChatTemplate:
        """Read one template from a file of its own (`--chat-template`)."""
        source = read_text(Path(path))
        return cls({DEFAULT: source}, origin=str(path), special_tokens=special_tokens)

    def render(
        self,
        messages: Any,
        *,
        tools: Any = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt for a conversation, special tokens included.

        Raises: RequestError, naming `messages`, `tools` or `chat_template_kwargs`.
        """
        checked = validate_messages(messages)
        checked_tools = validate_tools(tools)
        extra = validate_variables(kwargs, reserved=tuple(self._special_tokens))
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt exclude each other; "
                    "turn one off.",
                    parameter="continue_final_message",
                )
            checked = _tag_final_message(checked)
        variables = {
            **self._special_tokens,
            "documents": None,
            **extra,
            "messages": checked,
            "tools": checked_tools,
            "add_generation_prompt": add_generation_prompt,
        }
        text = self._render_checked(variables)
        return _cut_at_tag(text) if continue_final_message else text

    def probe(self) -> None:
        """Render a small conversation, with and without a system message and tools.

        A template that refuses the second kind on purpose passes; see `hostile` for what never
        does. Takes at most twice the time limit.
        Raises: ConfigError, naming the file, for a template that cannot render `user: hi`.
        """
        plain = {"messages": [PROBE_USER], "tools": None}
        rich = {"messages": [PROBE_SYSTEM, PROBE_USER], "tools": [PROBE_TOOL]}
        for variables, hostile in ((plain, None), (rich, ("security", "memory", "output"))):
            self._probe_with(variables, refused_kinds=hostile)

    def close(self) -> None:
        """End the child processes; a later `render` starts them again."""
        self._pool.close()

    def _probe_with(
        self, variables: Mapping[str, Any], *, refused_kinds: Sequence[str] | None
    ) -> None:
        values = {**self._special_tokens, "documents": None, **variables}
        answer = self._ask({**values, "add_generation_prompt": True})
        kind = answer["kind"]
        if kind == "text" or (
            refused_kinds is not None and kind not in (*refused_kinds, "time", "crash")
        ):
            return
        raise ConfigError(f"{self.origin}: {_explain(answer, self._limits)}")

    def _render_checked(self, variables: Mapping[str, Any]) -> str:
        answer = self._ask(variables)
        if answer["kind"] == "text":
            return str(answer["text"])
        raise RequestError(
            f"the chat template refused these messages: {_explain(answer, self._limits)}",
            parameter="messages",
        )

    def _ask(self, variables: Mapping[str, Any]) -> dict[str, Any]:
        name = self._choose(has_tools=bool(variables["tools"]))
        request = {
            "template": name,
            "variables": dict(variables),
            "max_chars": self._limits.output_chars,
        }
        try:
            return self._pool.ask(request)
        except TemplateStopped as stopped:
            return {"kind": stopped.reason}

    def _choose(self, *, has_tools: bool) -> str:
        if has_tools and WITH_TOOLS in self.templates:
            return WITH_TOOLS
        if DEFAULT in self.templates:
            return DEFAULT
        names = ", ".join(sorted(self.templates))
        raise ConfigError(f"{self.origin}: no template is named {DEFAULT!r}; there are: {names}.")


def _configured_templates(path: Path) -> dict[str, str]:
    """Return the templates in tokenizer_config.json, one text or a list of named ones."""
    value = read_optional_json_object(path).get("chat_template")
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT: value}
    allowed = "a text, or a list of objects with `name` and `template`"
    if isinstance(value, dict):
        value = [{"name": name, "template": source} for name, source in value.items()]
    if not isinstance(value, list):
        raise wrong_value(path, "chat_template", value, allowed)
    templates = {}
    for entry in value:
        pair = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else ()
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise wrong_value(path, "chat_template", entry, allowed)
        templates[str(pair[0])] = str(pair[1])
    return templates


def _explain(answer: Mapping[str, Any], limits: TemplateLimits) -> str:
    message = str(answer.get("message", ""))
    line = f" (line {answer['line']})" if answer.get("line") else ""
    return {
        "time": f"the template did not end within {limits.time_s:g} s.",
        "crash": "the template made the process that renders it crash.",
        "memory": "the template needs more memory than it may take.",
        "output": f"the template writes more than {limits.output_chars} characters.",
        "security": f"the template does something unsafe: {message}",
        "syntax": f"the template is not valid Jinja2: {message}{line}",
        "raised": message,
    }.get(str(answer["kind"]), f"the template fails: {message}")


def _tag_final_message(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mark where the last message ends, so that what the template writes after it can be cut."""
    final = dict(messages[-1])
    content = final.get("content")
    if isinstance(content, str):
        final["content"] = content + CONTINUE_TAG
    elif isinstance(content, list):
        last = {**content[-1], "text": content[-1]["text"] + CONTINUE_TAG}
        final["content"] = [*content[:-1], last]
    else:
        raise RequestError(
            "continue_final_message needs a last message with content.", parameter="messages"
        )
    return [*messages[:-1], final]


def _cut_at_tag(text: str) -> str:
    position = text.rfind(CONTINUE_TAG.strip())
    if position < 0:
        raise RequestError(
            "the chat template does not show the last message, so it cannot be continued.",
            parameter="continue_final_message",
        )
    kept = text[:position]
    # A template that trims its messages trimmed the tag's space: trim what stands before it too.
    return kept if text.startswith(CONTINUE_TAG, position) else kept.rstrip()
