"""The option table becomes command-line options, and only what was given reaches the engine."""

from __future__ import annotations

from typing import Any

import pytest

from quire.cli.main import Parser
from quire.cli.options import add_option, add_options, given_options, parse_bytes
from quire.config import OPTIONS, EngineConfig, option_name
from quire.errors import ConfigError


def parse(*argv: str) -> dict[str, Any]:
    """Parse as `quire generate` does and return the options that were given."""
    parser = Parser(prog="quire test", allow_abbrev=False)
    add_options(parser)
    return given_options(parser.parse_all(argv))


def help_text() -> str:
    """Return the help with its line breaks undone."""
    parser = Parser(prog="quire test")
    add_options(parser)
    return " ".join(parser.format_help().split())


def test_options_hold_only_what_was_given() -> None:
    assert parse() == {}
    assert parse("--block-size", "8") == {"block_size": 8}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_have_one_flag_for_each_row_of_the_table(name: str) -> None:
    assert option_name(name) in help_text()
    assert OPTIONS[name].meaning.split("%")[0][:20] in help_text()


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        (["--enable-prefix-caching"], {"enable_prefix_caching": True}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--max-model-len", "auto"], {"max_model_len": "auto"}),
        (["--max-model-len", "4096"], {"max_model_len": 4096}),
        (["--kv-cache-memory-bytes", "512M"], {"kv_cache_memory_bytes": 512 * 2**20}),
        (["--gpu-memory-utilization=0.5"], {"gpu_memory_utilization": 0.5}),
        (["--dtype", "float32"], {"dtype": "float32"}),
        (
            ["--disable-plugin", "a, b", "--disable-plugin", "c"],
            {"disable_plugin": ("a", "b", "c")},
        ),
        (
            ["--attention-option", "x.sizes=1,2", "--attention-option", "x.mode=a"],
            {"attention_option": ("x.sizes=1,2", "x.mode=a")},
        ),
    ],
)
def test_options_turn_texts_into_values(argv: list[str], given: dict[str, Any]) -> None:
    assert parse(*argv) == given
    assert EngineConfig.from_options(given).to_options() == given


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("1048576", 2**20),
        ("4G", 4 * 2**30),
        ("4g", 4 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("512 MB", 512 * 2**20),
        ("2T", 2 * 2**40),
        ("16K", 2**14),
        ("G", "G"),
        ("4X", "4X"),
        ("-1", -1),
    ],
)
def test_parse_bytes_knows_powers_of_1024(text: str, value: Any) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--block-size", "7"], "--block-size is 7; allowed: powers of two from 1 to 4096."),
        (["--block-size", "many"], "--block-size is 'many'; allowed: powers of two"),
        (["--block-size", "9" * 40], "--block-size is '9999"),
        (["--dtype", "float7"], "--dtype is 'float7'; allowed: auto, float32, bfloat16, float16."),
        (["--gpu-memory-utilization", "2"], "--gpu-memory-utilization is 2.0; allowed: numbers"),
        (["--gpu-memory-utilization", "nan"], "--gpu-memory-utilization is nan; allowed: numbers"),
        (["--gpu-memory-utilization", "x"], "--gpu-memory-utilization is 'x'; allowed: numbers"),
        (["--max-model-len", "automatic"], "--max-model-len is 'automatic'; allowed: auto, or"),
        (["--kv-cache-memory-bytes", "4X"], "--kv-cache-memory-bytes is '4X'; allowed: whole"),
        (["--disable-plugin", "a,,b"], "--disable-plugin has ''; allowed: names."),
        (["--seed", "-5"], "--seed is -5; allowed: whole numbers from 0"),
    ],
)
def test_options_with_bad_values_are_refused_by_name(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_options(parse(*argv))

    assert str(caught.value).startswith(message)


def test_options_are_not_abbreviated() -> None:
    with pytest.raises(ConfigError, match="unknown option '--block'"):
        parse("--block", "8")


@pytest.mark.parametrize(
    "fragment",
    [
        "tokens in one KV block (allowed: powers of two from 1 to 4096; unit: tokens; default: 16)",
        "unit: bytes, or with K, M, G, T",
        "find the blocks of equal prompt beginnings again (default: on)",
        "--no-enable-prefix-caching",
    ],
)
def test_options_say_meaning_range_unit_and_default(fragment: str) -> None:
    assert fragment in help_text()


def test_add_option_adds_one_row() -> None:
    parser = Parser(prog="quire test")
    add_option(parser, "disable_plugin")

    assert given_options(parser.parse_all(["--disable-plugin", "a"])) == {"disable_plugin": ("a",)}
