"""`quire explain MODEL`: every setting and who set it, every choice and why, every byte."""

from __future__ import annotations

import argparse
import json
from typing import Any

from quire.cli.options import add_options, given_options
from quire.config import OPTIONS, EngineConfig
from quire.execution.memory import describe_bytes
from quire.frontend import Frontend
from quire.interfaces.plugin import Selection
from quire.phases import Phases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire explain`."""
    parser.add_argument("model", help="folder, Hugging Face id, or bundled checkpoint (`demo`)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_options(parser, without=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Plan a start without loading weights, and print what it would do."""
    frontend = Frontend(EngineConfig.from_options(given_options(arguments)))
    try:
        found = explain(frontend)
    finally:
        frontend.close()
    print(json.dumps(found, indent=2) if arguments.json else _as_text(found))
    return 0


def explain(frontend: Frontend) -> dict[str, Any]:
    """Return settings, choices, memory and warnings as plain values."""
    phases = frontend.prepared.phases
    with phases.timed("imports"):
        from quire.start import Starter

    starter = Starter(frontend.prepared)
    layout = starter.plan()
    choices = [*frontend.prepared.selections, *layout.selections]
    return {
        "model": {
            "folder": str(frontend.prepared.folder),
            "architecture": frontend.prepared.raw_config["architectures"][0],
            "device": str(starter.device),
            **_task(frontend),
        },
        "settings": _settings(starter.config, layout.kv_size.max_model_len, layout.kv_size.why),
        "choices": [_choice(choice) for choice in choices],
        "self_check": layout.self_check,
        "memory": {
            "total": layout.budget.total,
            "measured": layout.budget.measured,
            "items": dict(layout.budget.items()),
            "num_kv_blocks": layout.kv_size.num_blocks if layout.has_kv_cache else 0,
            "block_size": frontend.config.cache.block_size,
            "kv_dtypes": sorted({group.layout.dtype for group in layout.groups}),
            "kv_bytes_per_token": sum(group.bytes_per_block for group in layout.groups)
            // frontend.config.cache.block_size,
            "kv_scales": layout.kv_scales_in_words,
            "windows": layout.windows,
        },
        "warnings": frontend.warnings,
        "phases_s": phases.seconds,
    }


def _task(frontend: Frontend) -> dict[str, str]:
    """Return what the model does, and why; nothing of one that generates."""
    setup = frontend.prepared.pooling
    if setup is None:
        return {}
    hidden_size = frontend.prepared.model_config.hidden_size
    return {"task": f"{setup.task}: {setup.why}", "pooling": setup.describe(hidden_size)}


def _settings(config: EngineConfig, max_model_len: int, why: str) -> list[dict[str, Any]]:
    rows = []
    for name in OPTIONS:
        row = {"name": name, "value": config.value(name), "set_by": config.source(name), "why": ""}
        if name == "max_model_len":
            own = config.source(name) == "default"
            row.update(value=max_model_len, why=why, set_by="model" if own else row["set_by"])
        rows.append(row)
    return rows


def _choice(choice: Selection) -> dict[str, Any]:
    return {
        "kind": choice.kind,
        "requested": choice.requested,
        "used": choice.used,
        "why": choice.why,
        "passed_over": [{"name": name, "why": why} for name, why in choice.passed_over],
    }


def _as_text(found: dict[str, Any]) -> str:
    lines = [f"{name}: {value}" for name, value in found["model"].items()]
    lines += ["", "settings (set by)"]
    for row in found["settings"]:
        why = f", {row['why']}" if row["why"] else ""
        value = "none" if row["value"] in (None, ()) else row["value"]
        lines.append(f"  {row['name']:<24} {value!s:<12} ({row['set_by']}{why})")
    lines += ["", "choices (requested -> used: why)"]
    for choice in found["choices"]:
        lines.append(
            f"  {choice['kind']:<14} {choice['requested']} -> {choice['used']}: {choice['why']}"
        )
        lines += [f"    passed over {p['name']}: {p['why']}" for p in choice["passed_over"]]
    lines += ["", "self-check", *(f"  {line}" for line in found["self_check"])]
    memory = found["memory"]
    how = "measured" if memory["measured"] else "activations estimated"
    lines += ["", f"memory ({describe_bytes(memory['total'])} in all, {how})"]
    lines += [f"  {name:<18} {describe_bytes(size)}" for name, size in memory["items"].items()]
    lines += _kv_lines(memory)
    lines += ["", "warnings", *(f"  {w}" for w in found["warnings"])] if found["warnings"] else []
    lines += ["", f"this took: {Phases(found['phases_s'])}"]
    return "\n".join(lines)


def _kv_lines(memory: dict[str, Any]) -> list[str]:
    blocks, size, windows = memory["num_kv_blocks"], memory["block_size"], memory["windows"]
    if not blocks:
        return ["  no KV cache: an encoder sees all tokens of an input at once"]
    slabs = "" if windows is None or windows["layers_a_slab"] is None else "slabs of "
    kinds, a_token = ", ".join(memory["kv_dtypes"]), memory["kv_bytes_per_token"]
    scales = f"; scales: {memory['kv_scales']}" if memory["kv_scales"] else ""
    return [
        f"  {blocks} {slabs}KV blocks of {size} tokens, block 0 for padding",
        f"  KV cache of {kinds}, {a_token:,} bytes a token{scales}",
        *(_windows_in_words(windows) if windows else []),
    ]


def _windows_in_words(windows: dict[str, Any]) -> list[str]:
    kinds = [
        f"{count} layers keep {'all' if window is None else f'a window of {window:,}'}"
        for count, window in windows["layers"]
    ]
    lines = [f"  {', '.join(kinds)}"]
    rows = windows["layers_a_slab"]
    lines += [] if rows is None else [f"  a slab is blocks of {rows} layers, for any of them"]
    held = describe_bytes(windows["sequence_bytes"])
    whole = describe_bytes(windows["sequence_bytes_without_windows"])
    tokens = windows["sequence_tokens"]
    return [*lines, f"  a sequence of {tokens:,} tokens holds {held}; without windows {whole}"]
