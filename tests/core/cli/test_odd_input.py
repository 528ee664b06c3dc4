"""Odd files and closed streams end in one clear line, and prompts arrive as they were written."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from quire.cli.chat import _read_tools
from quire.cli.generate import read_prompts
from quire.cli.main import main
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.text.generation_config import GenerationDefaults


def prompts_of(path: Path) -> list[object]:
    return read_prompts(argparse.Namespace(prompt=[], prompts_file=str(path)))


def test_prompts_file_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('a\u2028b\x0cc\n{"prompt": "d\u2028e"}\n', encoding="utf-8")

    assert prompts_of(path) == ["a\u2028b\x0cc", {"prompt": "d\u2028e"}]


def test_prompts_file_with_a_byte_order_mark_is_read_without_it(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('{"prompt": "a"}\n', encoding="utf-8-sig")

    assert prompts_of(path) == [{"prompt": "a"}]


def test_a_deeply_nested_prompts_file_line_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('{"prompt":' + "[" * 100_000)

    with pytest.raises(ConfigError, match="line 1: not JSON"):
        prompts_of(path)


def test_a_deeply_nested_tools_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    path.write_text("[" * 100_000)

    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        _read_tools(str(path))


def test_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)

    with pytest.raises(ConfigError, match="standard input, which is closed"):
        read_prompts(argparse.Namespace(prompt=["-"], prompts_file=None))


def test_a_generation_config_that_is_a_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").mkdir()

    with pytest.raises(ConfigError, match="cannot be read"):
        GenerationDefaults.from_folder(tmp_path)


def test_an_error_message_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["generate", "\x1b[31mEVIL", "-p", "x"])

    error = capsys.readouterr().err
    assert code == 2
    assert "\x1b" not in error
    assert "EVIL" in error


@pytest.mark.parametrize(("alias", "dtype"), [("half", "float16"), ("float", "float32")])
def test_dtype_takes_the_aliases_of_vllm(alias: str, dtype: str) -> None:
    assert EngineConfig.from_options({"dtype": alias}).model.dtype == dtype
