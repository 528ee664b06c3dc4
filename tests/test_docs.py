"""The documents tell the truth: signatures are the code's, code blocks run, hooks have tests."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest

from quire.hooks import hookspecs
from quire.hooks.kinds import KINDS
from quire.interfaces import plugin

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "tests/third_party/quire-example"
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
HOOKS_DOC = (ROOT / "docs/hooks.md").read_text()
HOOKS = [kind.hook for kind in KINDS.values()]
DESCRIPTORS = [kind.descriptor for kind in KINDS.values()] + [plugin.PluginOption]


@attrs.frozen(kw_only=True)
class Block:
    """A fenced block of a document.

    An HTML comment on the line above may say how it is meant: `not run: REASON` for a block that
    cannot run in a test, `file: PATH` for one that repeats a file of the example package,
    `part of: PATH` for one that repeats a part of ours,
    `saved as: PATH` for one that the reader saves; tests/third_party does that too.
    """

    document: str
    line: int
    language: str
    text: str
    not_run: str = ""
    file: str = ""
    part_of: str = ""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


FENCE = re.compile(
    r"^(?:<!-- (?P<key>[a-z ]+): (?P<value>.+?) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks_of(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a document."""
    content = path.read_text()
    for found in FENCE.finditer(content):
        marks = {found["key"]: found["value"]} if found["key"] else {}
        yield Block(
            document=path.relative_to(ROOT).as_posix(),
            line=content[: found.start("text")].count("\n"),
            language=found["language"],
            text=found["text"],
            not_run=marks.pop("not run", ""),
            file=marks.pop("file", ""),
            part_of=marks.pop("part of", ""),
        )
        marks.pop("saved as", "")
        assert not marks, f"{path}: unknown mark {marks}"


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]


def blocks(language: str) -> list[Block]:
    """Return the blocks of a language that are meant to run."""
    own = [b for b in BLOCKS if b.language == language and not b.not_run]
    return [b for b in own if not b.file and not b.part_of]


def python_programs() -> dict[str, str]:
    """Return each document's Python blocks as one program, as a reader would type them."""
    programs: dict[str, str] = {}
    for block in blocks("python"):
        padding = "\n" * (block.line - programs.get(block.document, "").count("\n"))
        programs[block.document] = programs.get(block.document, "") + padding + block.text
    return programs


PROGRAMS = python_programs()


@pytest.mark.parametrize("document", PROGRAMS)
def test_python_blocks_of_a_document_run_in_order(document: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAMS[document])

    done = subprocess.run(
        [sys.executable, str(program)], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )

    assert done.returncode == 0, f"{document} (line numbers are the document's):\n{done.stderr}"


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """Return the commands of a console block, each with the output that is shown below it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            assert found, f"{block}: output before the first `$ `"
            found[-1][1].append(line)
    return found


def shown_pattern(lines: list[str]) -> str:
    """Return a pattern for shown output, where `...` stands for anything."""
    text = re.escape("\n".join(lines).strip())
    return text.replace(re.escape("..."), ".*")


@pytest.mark.parametrize("block", blocks("console"), ids=str)
def test_console_blocks_run_and_print_what_they_show(block: Block, tmp_path: Path) -> None:
    for command, output in commands(block):
        program, *arguments = shlex.split(command)
        assert program == "quire", f"{block}: only `$ quire ...` runs; mark it <!-- not run: -->"

        done = subprocess.run(
            [sys.executable, "-m", "quire", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

        assert done.returncode == 0, f"{block}: {command}\n{done.stderr}"
        assert re.fullmatch(shown_pattern(output) or ".*", done.stdout.strip(), re.DOTALL), (
            f"{block}: {command} printed\n{done.stdout}"
        )


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_blocks_are_toml(block: Block) -> None:
    assert tomllib.loads(block.text)


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_blocks_are_json(block: Block) -> None:
    json.loads(block.text)


def test_blocks_are_of_a_language_that_is_checked_or_plain_text() -> None:
    languages = {"python", "console", "toml", "json", "text"}

    assert [str(block) for block in BLOCKS if block.language not in languages] == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.file], ids=str)
def test_blocks_that_repeat_a_file_of_the_example_are_that_file(block: Block) -> None:
    assert block.text == (EXAMPLE / block.file).read_text()


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.part_of], ids=str)
def test_blocks_that_repeat_a_part_of_a_file_are_in_it(block: Block) -> None:
    assert block.text in (ROOT / block.part_of).read_text()


def test_write_a_plugin_shows_every_file_of_the_example() -> None:
    shown = {b.file for b in BLOCKS if b.document == "docs/write-a-plugin.md" and b.file}
    suffixes = {".py", ".toml"}
    files = [path for path in EXAMPLE.rglob("*") if path.suffix in suffixes and path.is_file()]

    assert shown == {path.relative_to(EXAMPLE).as_posix() for path in files}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_document_has_the_exact_signature_of_every_hook(hook: str) -> None:
    signature = inspect.signature(getattr(hookspecs, hook))

    assert f"### `{hook}{signature}`".replace("'", "") in HOOKS_DOC.splitlines()


def test_hooks_document_has_the_hooks_in_the_order_in_which_quire_asks() -> None:
    assert re.findall(r"^### `(quire_\w+)", HOOKS_DOC, re.MULTILINE) == HOOKS


def described_fields(descriptor: type) -> list[tuple[str, str, str]]:
    """Return the rows of a descriptor's table in the document: name, type, default."""
    section = HOOKS_DOC.split(f"### `{descriptor.__name__}`\n")[1].split("\n#")[0]
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+?) \|", section, re.MULTILINE)
    return [(name, kind.replace("\\|", "|"), default.strip("`")) for name, kind, default in rows]


def default_of(attribute: attrs.Attribute) -> str:
    """Return a field's default as the document shows it."""
    if attribute.name in ("why_unusable", "is_built"):
        return {"why_unusable": "usable", "is_built": "built"}[attribute.name]
    if attribute.default is attrs.NOTHING:
        return "required"
    is_factory = isinstance(attribute.default, attrs.Factory)  # type: ignore[arg-type]
    return repr(attribute.default.factory() if is_factory else attribute.default)


@pytest.mark.parametrize("descriptor", DESCRIPTORS, ids=lambda d: d.__name__)
def test_hooks_document_has_every_field_of_every_descriptor(descriptor: type) -> None:
    fields = [(a.name, str(a.type), default_of(a)) for a in attrs.fields(descriptor)]

    assert described_fields(descriptor) == fields


def test_hooks_document_states_the_api_version() -> None:
    major, minor = plugin.API_VERSION

    assert f"This is API version **{major}.{minor}**." in HOOKS_DOC


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test_named_for_it(hook: str) -> None:
    named = re.compile(rf"^def test_{hook}_\w+\(", re.MULTILINE)
    tests = (ROOT / "tests/core/hooks").glob("test_*.py")

    assert any(named.search(path.read_text()) for path in tests)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_hooks_document_says_what_asks_for_each_kind(kind: object) -> None:
    assert f"| `{kind.name}` | `{kind.option}` |" in HOOKS_DOC  # type: ignore[attr-defined]
