"""The child process that renders chat templates: a template can hurt nobody but this process.

Run by its path, never imported; it knows only Jinja2 and the standard library. Reads JSON lines
from standard input, answers each with one on standard output. A render that takes too long is
ended by the kernel (SIGALRM), which no template can hold up; one that takes too much memory meets
RLIMIT_AS.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import Template, Undefined, nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_MESSAGE_CHARS = 400
PARENT_CHECK_S = 10.0
READ_BYTES = 2**20
KIND_TESTS = ("string", "iterable", "sequence", "mapping")


class OutputTooLong(Exception):
    """A rendering is longer than the limit."""


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as Transformers' `tojson` filter does: no HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def format_now(pattern: str) -> str:
    """Return the local time, as templates that write the date ask for it."""
    return datetime.now().strftime(pattern)


class Raised(TemplateError):
    """What a template raises on purpose."""


def raise_exception(message: object) -> None:
    """Let a template refuse its messages."""
    raise Raised(str(message))


class GenerationTag(Extension):
    """`{% generation %}` marks what a model wrote, for training; here its body is shown."""

    tags = {"generation"}  # noqa: RUF012  as Jinja2 declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("show"), [], [], body).set_lineno(line)

    def show(self, caller: Callable[[], str]) -> str:
        return caller()


class PlainDict:
    """`dict` without the class itself and what can be reached from it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class PlainNamespace(Namespace):
    """`namespace` that stores no name with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No parameter is named self: a template may pass one.
        values = dict(*args[1:], **kwargs)
        for name in values:
            check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        super().__setitem__(name, value)


def check_name(name: object) -> None:
    """Refuse names that could reach Python's internals."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot store {name!r}: it begins with an underscore")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja2's sandbox, but an unsafe attribute is an error even where it is not used."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        kind = type(obj).__name__
        raise SecurityError(f"access to attribute {attribute!r} of a {kind} is unsafe")


def build_environment() -> ImmutableSandboxedEnvironment:
    """Return the sandbox with what Transformers gives to chat templates.

    Source: _cached_compile_jinja_template of Transformers 5.
    """
    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=format_now,
        dict=PlainDict(),
        namespace=PlainNamespace,
    )
    return environment


def is_message_content(node: nodes.Node) -> bool:
    """Whether an expression is `content`, `m.content` or `m['content']`, filtered or not."""
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    if isinstance(node, nodes.Name):
        return node.name == "content"
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    key = node.arg if isinstance(node, nodes.Getitem) else None
    return isinstance(key, nodes.Const) and key.value == "content"


def content_style(tree: nodes.Template) -> str:
    """Return what a template takes as content: `string`, `both`, or only `parts`."""
    if not any(is_message_content(loop.iter) for loop in tree.find_all(nodes.For)):
        return "string"
    has_test = any(test.name in KIND_TESTS for test in tree.find_all(nodes.Test))
    return "both" if has_test else "parts"


def shape_content(content: Any, style: str) -> Any:
    """Give text in the form that the template takes; parts become lines, as in vLLM."""
    if style == "string" and isinstance(content, list):
        return "\n".join(part["text"] for part in content)
    if style == "parts" and isinstance(content, str):
        return [{"type": "text", "text": content}]
    return content


class Renderer:
    """Compiles each template once and renders it within its limits."""

    def __init__(self, sources: dict[str, str]) -> None:
        self._environment = build_environment()
        self._sources = sources
        self._compiled: dict[str, tuple[Template, str]] = {}

    def render(self, name: str, variables: dict[str, Any], max_chars: int) -> str:
        """Return the text. Raises: whatever Jinja2 or the template raises, OutputTooLong."""
        template, style = self._compile(name)
        for message in variables.get("messages", ()):
            if "content" in message:
                message["content"] = shape_content(message["content"], style)
        chunks: list[str] = []
        size = 0
        for chunk in template.generate(variables):
            size += len(chunk)
            if size > max_chars:
                raise OutputTooLong
            chunks.append(chunk)
        return "".join(chunks)

    def _compile(self, name: str) -> tuple[Template, str]:
        if name not in self._compiled:
            source = self._sources[name]
            style = content_style(self._environment.parse(source))
            self._compiled[name] = (self._environment.from_string(source), style)
        return self._compiled[name]


ERROR_KINDS: tuple[tuple[type[Exception], str], ...] = (
    (MemoryError, "memory"),
    (OutputTooLong, "output"),
    (Raised, "raised"),
    (SecurityError, "security"),
    (TemplateSyntaxError, "syntax"),
    (Exception, "failed"),
)


def answer(renderer: Renderer, line: bytes) -> tuple[str, bytes]:
    """Render one request; return what came of it and the answer. An error is an answer too."""
    try:
        request = json.loads(line)
        text = renderer.render(request["template"], request["variables"], request["max_chars"])
        return "text", json.dumps({"kind": "text", "text": text}).encode()
    except Exception as error:  # noqa: BLE001  a template may raise anything
        message = str(error)[:MAX_MESSAGE_CHARS] or type(error).__name__
        kind = next(kind for cls, kind in ERROR_KINDS if isinstance(error, cls))
        reply = {"kind": kind, "message": message, "line": getattr(error, "lineno", None)}
        return kind, json.dumps(reply).encode()


def limit_memory(extra_bytes: int) -> None:
    """Let this process grow by so many bytes and no more."""
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        used = 2**29
    limit = used + extra_bytes
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Not every system has the limit; time and output are bounded without it too.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class LineReader:
    """Lines of standard input; an empty one once the parent has closed its end or is gone."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self._data = bytearray()

    def next(self) -> bytes:
        """Wait for a line and return it."""
        searched = 0
        while (end := self._data.find(b"\n", searched)) < 0:
            searched = len(self._data)
            while not select.select([0], [], [], PARENT_CHECK_S)[0]:
                if os.getppid() != self._parent:
                    return b""
            part = os.read(0, READ_BYTES)
            if not part:
                return b""
            self._data += part
        line = bytes(self._data[: end + 1])
        del self._data[: end + 1]
        return line


def main() -> None:
    """Serve until the parent closes its end; leave after a render that ran out of memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    lines = LineReader()
    setup = json.loads(lines.next() or b"null")
    if setup is None:
        return
    renderer = Renderer(setup["templates"])
    limit_memory(setup["memory_bytes"])
    while line := lines.next():
        signal.setitimer(signal.ITIMER_REAL, setup["time_s"])
        kind, reply = answer(renderer, line)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(reply + b"\n")
        sys.stdout.buffer.flush()
        if kind == "memory":
            return


if __name__ == "__main__":
    main()
