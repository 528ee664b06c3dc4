"""`quire bench attention`: every usable attention backend on the same inputs, side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from quire.benchmark import attention_chart
from quire.benchmark.attention_shapes import ALLOWED, DEFAULTS, DRAWN, Shape
from quire.cli.numbers import COUNT
from quire.cli.options import add_options, given_options
from quire.config import OPTIONS, EngineConfig
from quire.errors import ConfigError, QuireError
from quire.hooks.registry import Registry, load_plugins
from quire.hooks.selection import answer_attention, parse_attention_options
from quire.interfaces.attention import AttentionSpec

if TYPE_CHECKING:
    from quire.benchmark.attention_bench import Contender

SUMMARY = "attention backends side by side: speed, share of the ceiling, and error"
EPILOG = f"""\
Shapes: {ALLOWED}.
Exit status 1: a backend failed or is wrong, or none could be measured.
"""
ALL = "all"
# Options of an engine that say something here too.
TAKEN = (
    *("dtype", "kv_cache_dtype", "block_size", "device", "num_threads", "seed"),
    *("attention_option", "disable_plugin"),
)


def _shapes(text: str) -> list[Shape]:
    try:
        return [Shape.parse(one.strip()) for one in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _heads(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    try:
        heads, kv_heads = int(first), int(second or first)
    except ValueError:
        heads = kv_heads = 0
    if not (0 < kv_heads <= heads <= 4096 and heads % kv_heads == 0):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; write HEADS/KV_HEADS, the first a multiple of the second"
        )
    return heads, kv_heads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire bench attention`."""
    add = parser.add_argument_group("benchmark").add_argument
    add("--backends", default=ALL, metavar="all|A,B", help="which ones, by name (default: all)")
    add(
        "--shapes",
        type=_shapes,
        metavar="SHAPE,...",
        help="steps to measure; not given: some that suit the device",
    )
    add("--heads", type=_heads, default=(32, 8), metavar="H/KV", help="heads (default: 32/8)")
    add("--head-dim", type=COUNT, default=128, help="dimensions of a head (default: 128)")
    add("--window", type=COUNT, help="latest tokens that a token sees; not given: all")
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", type=Path, metavar="FILE", help="draw bandwidth by context and batch: PNG or SVG")
    add_options(parser, without=[name for name in OPTIONS if name not in TAKEN])


def run(arguments: argparse.Namespace) -> int:
    """Check everything, measure and print; 1 where a backend failed or is wrong."""
    given = given_options(arguments)
    config = EngineConfig.from_options(given)
    registry = load_plugins(config.plugins.disable_plugin)
    names = _names(registry, arguments.backends)
    if arguments.plot is not None:
        attention_chart.check(arguments.plot)
    from quire.benchmark.attention_bench import has_failed, prepare_device
    from quire.benchmark.attention_bench import run as measure
    from quire.benchmark.attention_report import as_text

    device = prepare_device(config.device.device, config.device.num_threads)
    spec = _spec(arguments, config, device)
    may_build = arguments.backends != ALL
    contenders = _contenders(registry, names, spec, config, may_build=may_build)
    shapes = arguments.shapes
    if shapes is None:
        texts = (DEFAULTS if arguments.plot is None else DRAWN)[device]
        shapes = [Shape.parse(text) for text in texts]
    report = measure(contenders, shapes, spec, config.device.seed)
    print(json.dumps(report) if arguments.json else as_text(report))
    if arguments.plot is not None:
        attention_chart.draw(report, arguments.plot)
    return 1 if has_failed(report) else 0


def _names(registry: Registry, text: str) -> list[str]:
    """Return the names that are asked for. Raises: ConfigError for an unknown one."""
    if text == ALL:
        return registry.names("attention")
    names = [name.strip() for name in text.split(",")]
    for name in names:
        registry.attention(name)
    if len(set(names)) < len(names):
        raise ConfigError(f"--backends {text} names one twice; name each once.")
    return names


def _spec(arguments: argparse.Namespace, config: EngineConfig, device: str) -> AttentionSpec:
    heads, kv_heads = arguments.heads
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=arguments.head_dim,
        value_head_dim=arguments.head_dim,
        scale=arguments.head_dim**-0.5,
        dtype=dtype,
        kv_dtype=dtype if config.kv_dtype == "auto" else config.kv_dtype,
        block_size=config.cache.block_size,
        device=device,
        sliding_window=arguments.window,
    )


def _contenders(
    registry: Registry,
    names: list[str],
    spec: AttentionSpec,
    config: EngineConfig,
    *,
    may_build: bool,
) -> list[Contender]:
    """Return who takes part, and who cannot; `may_build`: what was asked for by name is built."""
    from quire.benchmark.attention_bench import Contender

    plugins = [registry.attention(name) for name in names]
    options = parse_attention_options(registry, plugins, config.plugins.attention_option)
    found = []
    for plugin in plugins:
        try:
            backend, reason = answer_attention(registry, plugin, spec, may_build=may_build)
        except QuireError as error:
            backend, reason = None, str(error)
        found.append(
            Contender(
                name=plugin.name, backend=backend, options=options[plugin.name], reason=reason
            )
        )
    return found
