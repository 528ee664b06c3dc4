"""A chat template renders a conversation, and can hurt nobody however it is written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from quire.errors import ConfigError, RequestError
from quire.text.chat_template import ChatTemplate
from quire.text.template_process import TemplateLimits, TemplateProcess, TemplateStopped
from quire.text.tokenizer import Tokenizer

SMALL = TemplateLimits(output_chars=50_000, memory_bytes=96 * 2**20)
SHORT = TemplateLimits(time_s=0.3, output_chars=50_000, memory_bytes=96 * 2**20)
ORIGIN = "model/tokenizer_config.json: chat_template"
HI = [{"role": "user", "content": "hi"}]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"

Make = Callable[..., ChatTemplate]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[ChatTemplate] = []

    def build(source: str, limits: TemplateLimits = SMALL) -> ChatTemplate:
        tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        template = ChatTemplate(
            {"default": source}, origin=ORIGIN, special_tokens=tokens, limits=limits
        )
        made.append(template)
        return template

    yield build
    for template in made:
        template.close()


def test_special_tokens_and_messages_reach_the_template(make: Make) -> None:
    assert make("{{ bos_token }}" + PLAIN).render(HI) == "<s><user>hi"


def test_no_process_starts_before_something_is_rendered(make: Make) -> None:
    template = make(PLAIN)
    assert template._pool.num_idle == 0

    template.render(HI)

    assert template._pool.num_idle == 1


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "class_only": ("{{ ''.__class__ }}", "unsafe"),
    "class_unused": ("{% set c = messages.__class__ %}", "unsafe"),
    "dunder": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "cycler": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
    "namespace": ("{% set n = namespace(__class__=1) %}", "unsafe"),
    "format": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
    "format_map": ("{{ '{a.__class__}'.format_map({'a': 1}) }}", "unsafe"),
    "loop": (LOOP, "within"),
    "power": ("{{ 9 ** (9 ** 9) }}", "within"),
    "regex_like": ("{{ ('a' * 9999999)|wordwrap(1)|length }}{{ range(99999)|sort|list * 9 }}", ""),
    "times": ("{{ 'a' * 2000000000 }}", "memory"),
    "times_twice": ("{{ ('a' * 99999) * 99999 }}", "memory"),
    "tilde": (
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}"
        "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x|length }}",
        "the template",
    ),
    "join": ("{{ ('a' * 99999).join(['b'] * 99999) }}", "the template"),
    "center": ("{{ 'a'|center(2000000000) }}", "memory"),
    "percent": ("{{ '%2000000000d'|format(1) }}", "memory"),
    "replace": ("{{ ('a' * 99999)|replace('a', 'b' * 99999) }}", "memory"),
    "indent": ("{{ ('a\\n' * 9999)|indent(99999) }}", "the template"),
    "output": ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "50000 characters"),
    "range": ("{{ range(10 ** 12)|list }}", "Range too big"),
    "macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "nested": ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "fails"),
    "syntax": ("{% if x %}\n{% endfor %}", "not valid Jinja2"),
    "unknown_filter": ("{{ 1|nope }}", "nope"),
    "undefined": ("{{ a.b.c }}", "undefined"),
    "raises_always": ("{{ raise_exception('never') }}", "never"),
    "include": ("{% include '/etc/passwd' %}", "fails"),
}


def peak_kib(*, anew: bool = False) -> int:
    """Return the most memory that this process had at once, KiB; `anew`: from now on."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("name", HOSTILE)
def test_the_probe_refuses_a_hostile_template_naming_file_and_key(name: str, make: Make) -> None:
    source, said = HOSTILE[name]
    start, before = time.monotonic(), peak_kib(anew=True)

    with pytest.raises(ConfigError) as error:
        make(source, SHORT).probe()

    message = str(error.value)
    assert message.startswith(ORIGIN)
    assert said in message
    assert len(message) < 700
    assert "\n" not in message
    assert time.monotonic() - start < 5
    assert peak_kib() - before < 2**18, "KiB: below 256 MiB more than was there"


@pytest.mark.parametrize(
    "source",
    [
        PLAIN,
        "{% if tools %}{{ raise_exception('no tools') }}{% endif %}" + PLAIN,
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + PLAIN,
        "{{ missing }}{{ messages[0].content | upper }}",
    ],
)
def test_the_probe_accepts_a_template_that_renders_a_plain_message(source: str, make: Make) -> None:
    make(source).probe()


def test_the_probe_finds_a_loop_that_only_tools_reach(make: Make) -> None:
    with pytest.raises(ConfigError, match="did not end"):
        make("{% if tools %}" + LOOP + "{% endif %}" + PLAIN, SHORT).probe()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ raise_exception('x' * 99999) }}", "xxx"),
        ("{{ 'a' * 2000000000 }}", "memory"),
        ("{% set n = 9 %}{{ n ** (n ** n) }}", "did not end"),
    ],
)
def test_a_template_that_fails_on_a_request_is_that_requests_error(
    source: str, said: str, make: Make
) -> None:
    template = make("{% if messages|length > 1 %}" + source + "{% endif %}" + PLAIN, SHORT)

    with pytest.raises(RequestError) as error:
        template.render(HI + HI)

    assert error.value.parameter == "messages"
    assert said in str(error.value)
    assert len(str(error.value)) < 700
    assert template.render(HI) == "<user>hi", "the next request is served"


def test_a_killed_process_is_replaced(make: Make) -> None:
    template = make(PLAIN)
    template.render(HI)
    os.kill(template._pool._idle[0].pid, signal.SIGKILL)
    time.sleep(0.05)

    assert template.render(HI) == "<user>hi"


def test_many_threads_render_at_once(make: Make) -> None:
    template = make("{{ messages[0].content * 3 }}")
    asked = [str(i) for i in range(60)]

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda t: template.render([{"role": "user", "content": t}]), asked))

    assert texts == [text * 3 for text in asked]
    assert template._pool.num_idle <= SMALL.num_processes


def test_a_large_conversation_passes_through(make: Make) -> None:
    limits = TemplateLimits(output_chars=4_000_000)
    content = "🦉 text " * 200_000

    assert (
        make("{{ messages[0].content }}", limits).render([{"role": "user", "content": content}])
        == content
    )


def test_close_leaves_no_process(make: Make) -> None:
    template = make(PLAIN)
    template.render(HI)
    pid = template._pool._idle[0].pid

    template.close()

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


PARENT = """
import sys, time
from quire.text.chat_template import ChatTemplate, TemplateLimits
source = "{% if messages|length > 1 %}{% set n = 9 %}{{ n ** (n ** n) }}{% endif %}x"
limits = TemplateLimits(time_s=0.8)
t = ChatTemplate({"default": source}, origin="x", special_tokens={}, limits=limits)
hi = [{"role": "user", "content": "hi"}]
t.render(hi)
print(t._pool._idle[0].pid, flush=True)
if sys.argv[1] == "busy":
    t.render(hi + hi)
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_the_child_dies_with_its_parent_without_a_main_guard(state: str) -> None:
    command = [sys.executable, "-c", PARENT, state]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        time.sleep(0.1)
        parent.kill()

    assert wait_until_gone(pid, 4)


def test_the_child_sees_none_of_the_environments_secrets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    process = TemplateProcess({"default": "x"}, SHORT)
    environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    process.close()

    assert b"secret" not in environment


def test_a_process_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire.text.template_process.START_GRACE_S", 0.0)
    process = TemplateProcess({"default": "x"}, TemplateLimits(time_s=0.3))
    os.kill(process.pid, signal.SIGSTOP)

    with pytest.raises(TemplateStopped, match="time"):
        process.ask({"template": "default", "variables": {}, "max_chars": 9})

    assert not process.is_usable


def test_text_parts_become_lines_for_a_template_that_takes_text(make: Make) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    assert make(PLAIN).render([{"role": "user", "content": parts}]) == "<user>a\nb"


def test_text_becomes_a_part_for_a_template_that_takes_only_parts(make: Make) -> None:
    parts = "{% for c in m['content'] %}[{{ c['text'] }}]{% endfor %}"
    source = "{% for m in messages %}" + parts + "{% endfor %}"

    assert make(source).render(HI) == "[hi]"


def test_both_forms_reach_a_template_that_tells_them_apart(make: Make) -> None:
    source = (
        "{% set m = messages[0] %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for content in m.content %}[{{ content.text }}]{% endfor %}{% endif %}"
    )
    template = make(source)

    assert template.render(HI) == "hi"
    assert template.render([{"role": "user", "content": ["a", "b"]}]) == "[a][b]"


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "bos_token", "_x", "a b"])
def test_reserved_variable_names_are_refused(name: str, make: Make) -> None:
    with pytest.raises(RequestError) as error:
        make(PLAIN).render(HI, kwargs={name: 1})

    assert error.value.parameter == "chat_template_kwargs"


@pytest.mark.parametrize("value", [2**70, {None: 1}, {1: 2}, "é\u2028\n\U0001f600", 0.5], ids=repr)
def test_whatever_json_can_carry_reaches_the_template(value: Any, make: Make) -> None:
    variables = {"value": {"inner": value}}

    text = make("{{ value | tojson }}").render(HI, kwargs=variables)

    assert json.loads(text) == json.loads(json.dumps(variables["value"]))


def test_other_variables_reach_the_template(make: Make) -> None:
    assert make("{{ enable_thinking }}").render(HI, kwargs={"enable_thinking": False}) == "False"


def write(folder: Path, config: Any = None, **files: str) -> Path:
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        path = folder / f"{name}.jinja"
        if name != "chat_template":
            path = folder / "additional_chat_templates" / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(write(tmp_path, {}), special_tokens={}) is None
    assert ChatTemplate.from_folder(tmp_path / "nothing", special_tokens={}) is None


NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


@pytest.mark.parametrize(
    ("config", "files", "templates"),
    [
        ({"chat_template": "C"}, {}, {"default": "C"}),
        ({"chat_template": NAMED}, {}, {"default": "D", "tool_use": "T"}),
        ({"chat_template": "C"}, {"chat_template": "F"}, {"default": "F"}),
        ({}, {"chat_template": "F", "tool_use": "T"}, {"default": "F", "tool_use": "T"}),
    ],
)
def test_templates_are_read_from_every_place(
    config: Any, files: dict[str, str], templates: dict[str, str], tmp_path: Path
) -> None:
    template = ChatTemplate.from_folder(write(tmp_path, config, **files), special_tokens={})

    assert template is not None
    assert template.templates == templates


def test_the_tool_template_is_taken_when_there_are_tools() -> None:
    template = ChatTemplate(
        {"default": "D", "tool_use": "T"}, origin=ORIGIN, special_tokens={}, limits=SMALL
    )
    tool = {"type": "function", "function": {"name": "f"}}

    assert template.render(HI) == "D"
    assert template.render(HI, tools=[tool]) == "T"
    template.close()


@pytest.mark.parametrize(
    "value", [5, [1], [{"name": "default"}], {"default": 3}, [{"name": 1, "template": "x"}]]
)
def test_a_damaged_template_setting_names_file_and_key(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer_config.json: chat_template"):
        ChatTemplate.from_folder(write(tmp_path, {"chat_template": value}), special_tokens={})


def test_a_template_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nope.jinja"):
        ChatTemplate.from_file(tmp_path / "nope.jinja", special_tokens={})


def test_named_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    template = ChatTemplate({"rag": "x"}, origin=ORIGIN, special_tokens={})

    with pytest.raises(ConfigError, match="rag"):
        template.probe()


@pytest.mark.parametrize("kind", ["llama3", "llama2", "mistral"])
@pytest.mark.parametrize("source", ["{{ bos_token }}{{ messages[0].content }}", PLAIN])
def test_the_begin_token_comes_exactly_once(
    kind: str, source: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    tokenizer = tokenizer_of(kind)
    template = ChatTemplate(
        {"default": source}, origin=ORIGIN, special_tokens=tokenizer.special_tokens
    )
    ids = tokenizer.encode_chat(template.render(HI))
    template.close()

    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(ids[0]) == 1


def test_no_begin_token_is_put_where_the_tokenizer_has_none(
    tokenizer_of: Callable[[str], Tokenizer],
) -> None:
    tokenizer = tokenizer_of("qwen2")

    assert tokenizer.encode_chat("hello") == tokenizer.encode("hello")
