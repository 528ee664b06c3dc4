"""Grammars are tried in a process that can be killed; engines of strangers go the same way."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
from tiny_llama import OPTIONS, has_all_blocks

from quire import LLM, SamplingParams
from quire.constraints import GrammarSource, StructuredOutputsParams
from quire.errors import ConfigError, RequestError
from quire.structured import check_queue, checker
from quire.structured.check_process import _allowed_from
from quire.structured.checker import GrammarChecker
from quire.structured.compiler import GrammarSetup

STRANGER = '''
import time
from quire import hookimpl
from quire.interfaces.grammar import (
    CompiledGrammar, GrammarEngine, GrammarMatcher, GrammarStuck,
)
from quire.interfaces.plugin import GrammarPlugin

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_grammar_engines():
    return [GrammarPlugin(name="repeat", load="strangers_grammar:Repeat", priority=1)]


class Repeat(GrammarEngine):
    """The regex "hang" hangs, "crash" ends the process; any other is a text to be written."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def compile(self, source):
        if source.text == "hang":
            while True:
                pass
        if source.text == "crash":
            import os
            os._exit(1)
        if source.text == "memory":
            bytearray(2 ** 31)
        if source.text == "raise":
            raise KeyError("a mistake")
        if source.kind != "regex":
            raise ValueError(f"no {source.kind} here")
        tokens = self.vocabulary.encode(source.text)
        return Text(tokens, self.vocabulary.eos_token_ids[0])


class Text(CompiledGrammar):
    def __init__(self, tokens, end):
        self.tokens, self.end = tokens, end

    def start(self):
        return Place(self)


class Place(GrammarMatcher):
    def __init__(self, text):
        self.left = [*text.tokens, text.end]

    def fill_mask(self, mask):
        mask[:] = 0
        token = self.left[0]
        mask[token // 32] = 1 << token % 32 if token % 32 < 31 else -(2**31)

    def accept(self, token_id):
        if self.left.pop(0) != token_id:
            raise GrammarStuck("another token")

    def is_terminated(self):
        return len(self.left) <= 1
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama.write_folder(folder, vocab_size=260, eos_token_id=256)
    return tiny_llama.write_tokenizer(folder)


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package of somebody else with a grammar engine."""
    info = tmp_path / "strangers_grammar-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers-grammar\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[quire]\nstrangers-grammar = strangers_grammar\n")
    (tmp_path / "strangers_grammar.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)


def setup(folder: Path, backend: str) -> GrammarSetup:
    return GrammarSetup(backend=backend, folder=folder, vocab_size=260, eos_token_ids=(256,))


@pytest.fixture
def strange(folder: Path, stranger: None) -> Iterator[GrammarChecker]:
    found = GrammarChecker(setup(folder, "repeat"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def own(folder: Path) -> Iterator[GrammarChecker]:
    found = GrammarChecker(setup(folder, "llguidance"))
    found.check(StructuredOutputsParams(regex="a"))
    yield found
    found.close()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"not": {"type": "null"}}}, "not"),
        ({"json": {"if": {}, "then": {}}}, "if"),
        ({"json": {"dependentRequired": {"a": ["b"]}}}, "dependentRequired"),
        ({"json": {"type": "string", "format": "nonsense"}}, "nonsense"),
        ({"json": {"$ref": "http://example.com/schema"}}, "http://example.com/schema"),
        ({"json": {"x-guidance": {"lenient": True}, "not": {}}}, "x-guidance"),
        ({"json": {"type": "string", "minLength": 3, "maxLength": 1}}, "minLength"),
        ({"json": False}, "cannot be honoured"),
        ({"json": {"$ref": "#"}}, "never end"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "(a)\\1"}, "backreferences"),
        ({"regex": "(("}, "unclosed group"),
        ({"regex": "a[^\\s\\S]"}, "nothing can match"),
        ({"grammar": 'start: "a" start'}, "never ends"),
        ({"grammar": 'start: "a" undefined'}, "undefined"),
        ({"grammar": "root ::= 'a'"}, "cannot be honoured"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_enforced_is_refused_within_a_second(
    own: GrammarChecker, form: dict[str, Any], message: str
) -> None:
    begin = time.perf_counter()

    with pytest.raises(RequestError, match=message) as caught:
        own.check(StructuredOutputsParams(**form, asked_as="guided"))

    assert caught.value.parameter == "guided"
    assert time.perf_counter() - begin < 1
    assert len(own.pids) <= 2


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "(.*a){200}.{400}b.{500}"},
        {"regex": "((a{1,1000}){1,1000}){1,1000}"},
        {"regex": "(a|b|ab)*(.*c){1,50}(.*d){1,50}x"},
        {"json": {"enum": [f"x{i}" for i in range(20_000)]}},
        {"json": {"type": "array", "minItems": 100_000, "items": {"type": "string"}}},
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_could_explode_is_answered_in_time(own: GrammarChecker, form: dict[str, Any]) -> None:
    asked = StructuredOutputsParams(**form)
    begin = time.perf_counter()

    with contextlib.suppress(RequestError):
        own.check(asked)

    assert time.perf_counter() - begin < 2.5  # a child that was killed is started again


@pytest.mark.parametrize("text", ["hang", "crash"])
def test_a_process_that_hangs_or_ends_is_replaced(strange: GrammarChecker, text: str) -> None:
    strange.check(StructuredOutputsParams(regex="good"))
    before = strange.pids
    begin = time.perf_counter()

    with pytest.raises(RequestError, match="takes more than"):
        strange.check(StructuredOutputsParams(regex=text))
    with pytest.raises(RequestError, match="takes more than"):
        strange.check(StructuredOutputsParams(regex=text))

    assert time.perf_counter() - begin < 2  # nobody waits for a new child
    after = strange.pids
    assert len(before) == len(after) == 2
    assert [pid for pid in before if is_running(pid)] == [pid for pid in before if pid in after]
    assert set(before) != set(after)
    strange.check(StructuredOutputsParams(regex="another"))
    strange.close()
    assert not any(map(is_running, [*before, *after]))


@pytest.mark.parametrize(
    ("text", "message"), [("memory", "more memory"), ("raise", "the grammar engine failed: KeyErr")]
)
def test_an_engines_faults_are_refusals(strange: GrammarChecker, text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        strange.check(StructuredOutputsParams(regex=text))
    strange.check(StructuredOutputsParams(regex="good"))


def test_an_answer_is_kept_by_content(own: GrammarChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    good = StructuredOutputsParams(choice=["kept", "by content"])
    own.check(good)
    monkeypatch.setattr(checker.CheckProcess, "ask", lambda *_: "asked again")

    own.check(StructuredOutputsParams(choice=("kept", "by content")))

    with pytest.raises(RequestError, match="asked again"):
        own.check(StructuredOutputsParams(choice=["new"]))


def test_several_grammars_are_checked_before_their_answers_are_asked_for(
    own: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = [StructuredOutputsParams(regex=f"side by side {i}") for i in range(6)]
    bad = StructuredOutputsParams(regex="side by side ((")
    honoured: list[GrammarSource] = []
    own.check_all([*good, bad, good[0]], honoured.append)
    assert all(map(own.knows, [*good, bad]))
    assert sorted(one.text for one in honoured) == sorted(one.source.text for one in good)
    monkeypatch.setattr(checker.CheckProcess, "ask", lambda *_: "asked again")

    for one in good:
        own.check(one)
    with pytest.raises(RequestError, match="unclosed group"):
        own.check(bad)


@pytest.mark.parametrize("bad", ["hang", "crash"])
def test_a_grammar_that_ends_its_child_keeps_no_other_from_its_answer(
    strange: GrammarChecker, monkeypatch: pytest.MonkeyPatch, bad: str
) -> None:
    monkeypatch.setattr(checker, "CHECK_S", 0.3)
    monkeypatch.setattr(check_queue, "AHEAD_CHARS", 60)
    # Some are sent while another is checked, some are too long for that.
    good = [StructuredOutputsParams(regex=f"{i}" + "x" * (7 * i)) for i in range(14)]
    ends = StructuredOutputsParams(regex=bad)
    honoured: list[GrammarSource] = []

    strange.check_all([*good[:3], ends, *good[3:]], honoured.append)

    assert {one.text for one in honoured} == {one.source.text for one in good}
    assert [strange.knows(one) for one in (*good, ends)] == [True] * 14 + [False]


def test_a_child_that_was_prepared_is_the_one_that_is_asked(folder: Path) -> None:
    found = GrammarChecker(setup(folder, "llguidance"))
    found.prepare()
    before = found.pids

    found.check(StructuredOutputsParams(regex="a"))

    assert len(before) == 1
    assert before[0] in found.pids
    found.close()
    assert not is_running(before[0])


def test_a_childs_pipes_are_closed_when_no_thread_reads_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = checker.CheckProcess(setup(folder, "llguidance"), ())
    read, reads, may_read = os.read, threading.Event(), threading.Event()

    def read_late(source: int, size: int) -> bytes:
        reads.set()
        assert may_read.wait(5)
        return read(source, size)  # of a closed pipe this would be another child's

    monkeypatch.setattr(checker.os, "read", read_late)
    with ThreadPoolExecutor(2) as threads:
        answer = threads.submit(child.receive, 5)
        child._process.kill()
        assert reads.wait(5)
        closed = threads.submit(child.close)
        wait([closed], 0.1)
        is_open = child._process.stdout is not None and not child._process.stdout.closed
        may_read.set()

    assert is_open
    assert isinstance(answer.exception(), checker.CheckStopped)
    assert "no answer" in str(answer.exception())
    assert closed.exception() is None
    assert child._process.stdout is not None
    assert child._process.stdout.closed


def test_a_strangers_engine_serves_without_a_change_of_the_core(
    folder: Path, stranger: None
) -> None:
    options = {**OPTIONS, "skip_tokenizer_init": False, "grammar_backend": "repeat"}
    llm = LLM(str(folder), **options)
    form = {"regex": "a text"}

    found = llm.generate(
        ["x", "y"], SamplingParams(max_tokens=20, n=2, structured_outputs=form), use_tqdm=False
    )

    answers = [(a.text, a.finish_reason) for output in found for a in output.outputs]
    assert answers == [("a text", "stop")] * 4
    assert has_all_blocks(llm.engine)
    with pytest.raises(RequestError, match="no choice here"):
        llm.generate("x", SamplingParams(structured_outputs={"choice": ["a"]}), use_tqdm=False)
    llm.frontend.close()


def test_an_unknown_engine_is_refused_at_the_start(folder: Path) -> None:
    with pytest.raises(ConfigError, match="unknown grammar engine 'llguidence'.*llguidance"):
        LLM(str(folder), **{**OPTIONS, "grammar_backend": "llguidence"})


def test_without_an_engine_requests_are_told_how_to_get_one(folder: Path) -> None:
    options = {**OPTIONS, "skip_tokenizer_init": False}
    llm = LLM(str(folder), **options, disable_plugin=["grammar-llguidance", "grammar-xgrammar"])

    with pytest.raises(RequestError, match="no grammar engine"):
        llm.generate("x", SamplingParams(structured_outputs={"regex": "a"}), use_tqdm=False)
    llm.frontend.close()


@pytest.mark.parametrize(
    ("first", "bits", "token_id"),
    [
        (0, 0b1000, 3),
        (3, 0b1000, 3),
        (4, 0b1000, 3),
        (2, 0b10011, 4),
        (70, 1 << 65 | 2, 1),
        (5, 0, None),
    ],
)
def test_a_walk_takes_the_next_allowed_token_around(
    first: int, bits: int, token_id: int | None
) -> None:
    assert _allowed_from(first, bits) == token_id
