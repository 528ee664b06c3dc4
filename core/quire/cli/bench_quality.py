"""`quire bench quality MODEL`: how well a model predicts, and how near to itself unquantized."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quire.cli.numbers import number
from quire.cli.options import add_options, given_options
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.frontend import Frontend

SUMMARY = "perplexity on a text or on dialogues, and the distance to the unquantized model"
EPILOG = """\
Every token but the first of a passage is guessed. With --quantization NAME or --kv-cache-dtype the
same model in its own dtype is loaded beside, unless --baseline names another one.
"""
# `auto`: no more of the context than fits beside the baseline, which takes as much.
ENGINE_DEFAULTS = {
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 512 << 20,
    "max_model_len": "auto",
}
# Of these the baseline has none.
QUANTIZING = ("quantization", "kv_cache_dtype")
VALIDATION = Path(__file__).parents[3] / "tests/data/coffee_orders_valid.jsonl"
FIGURES = ("tokens", "perplexity", "accuracy", "agreement", "kl_divergence")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire bench quality`."""
    parser.add_argument("model", help="folder, Hugging Face id, or bundled checkpoint (`demo`)")
    group = parser.add_argument_group("benchmark")
    files = group.add_mutually_exclusive_group()
    files.add_argument("--text", type=Path, metavar="FILE", help="a text in UTF-8")
    files.add_argument(
        "--chat",
        type=Path,
        metavar="FILE",
        help="JSONL, each line with `messages` and perhaps `tools` (for `demo` in a checkout of "
        "the repository: its validation dialogues)",
    )
    add = group.add_argument
    add("--window", type=number(int, 2), default=1024, help="tokens of a passage (default: 1024)")
    add("--baseline", metavar="MODEL", help="compare with this one, in its own dtype")
    add("--json", action="store_true", help="print one JSON object")
    add_options(parser, without=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then load, measure and print. Raises: QuireError."""
    text, chat = arguments.text, _chat_of(arguments)
    given = {**ENGINE_DEFAULTS, **given_options(arguments)}
    frontend = Frontend(EngineConfig.from_options(given))
    opened = [frontend]
    try:
        from quire.benchmark.passages import chat_ids, cut, text_ids

        passages = text_ids(frontend, text) if chat is None else chat_ids(frontend, chat)
        cut(passages, arguments.window)  # refused before anything is loaded
        baseline = _baseline(given, arguments.baseline)
        if baseline is not None:
            opened.append(baseline)
        from quire.benchmark.quality import measure

        report = measure(frontend, passages, baseline, window=arguments.window)
    finally:
        for one in opened:
            one.close()
    report["workload"]["file"] = str(text if chat is None else chat)
    print(json.dumps(report) if arguments.json else as_text(report))
    return 0


def _chat_of(arguments: argparse.Namespace) -> Path | None:
    """Return the file of dialogues, None where a text was given. Raises: ConfigError."""
    if arguments.text is not None or arguments.chat is not None:
        chat: Path | None = arguments.chat
        return chat
    if arguments.model == "demo" and VALIDATION.is_file():
        return VALIDATION
    raise ConfigError("nothing to measure on; give --text FILE or --chat FILE.")


def _baseline(given: Mapping[str, Any], model: str | None) -> Frontend | None:
    """Open what the model is compared with; None where there is nothing to compare."""
    is_plain = all(given.get(name) in (None, "none", "auto") for name in QUANTIZING)
    if model is None and is_plain:
        return None
    kept = {name: value for name, value in given.items() if name not in QUANTIZING}
    return Frontend(EngineConfig.from_options({**kept, "model": model or given["model"]}))


def as_text(report: Mapping[str, Any]) -> str:
    """Return a report as lines for people."""
    lines = [f"{report['benchmark']}: {report['model']}"]
    for name in ("machine", "choices", "settings", "workload"):
        lines.append(f"{name:<11}" + ", ".join(f"{k} {v}" for k, v in report[name].items()))
    head = f"{'quantization':<16}{'kv cache':<16}"
    lines += ["", head + "".join(f"{name:>15}" for name in FIGURES)]
    for row in report["rows"]:
        cells = "".join(f"{_shown(name, row[name]):>15}" for name in FIGURES)
        lines.append(f"{row['quantization']:<16}{row['kv_cache']:<16}{cells}")
    return "\n".join(lines)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if name == "tokens" else f"{value:.5f}"
