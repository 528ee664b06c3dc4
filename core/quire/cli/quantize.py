"""`quire quantize MODEL --method NAME --output DIR`: write a quantized checkpoint."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quire.cli.numbers import COUNT, POSITIVE
from quire.cli.options import add_option, given_options
from quire.config import EngineConfig, nearest
from quire.errors import ConfigError
from quire.frontend import Frontend
from quire.quantize.calibration import calibration_file, read_samples

if TYPE_CHECKING:
    from quire.interfaces.plugin import QuantizationPlugin
    from quire.quantize.run import Done, Job

# Settings of an engine that bear upon quantizing.
OPTIONS = (
    "revision",
    "tokenizer",
    "chat_template",
    "trust_remote_code",
    "model_implementation",
    "attention_backend",
    "disable_plugin",
    "device",
    "num_threads",
)
NUM_SAMPLES, SEQ_LEN = 128, 1024
# With fewer tokens a user is warned.
FEW_TOKENS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire quantize`."""
    parser.add_argument("model", help="folder, Hugging Face id, or bundled checkpoint (`demo`)")
    add = parser.add_argument
    add("--method", required=True, metavar="NAME", help="what to write: gptq, awq, fp8, int8, int4")
    add("--output", required=True, type=Path, metavar="DIR", help="a new or empty folder")
    add(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="for gptq and awq: a text, or JSONL with `messages` or `text` a line "
        "(default: the checkpoint's own calibration.jsonl)",
    )
    add("--num-samples", type=COUNT, default=NUM_SAMPLES, help="pieces of it (default: 128)")
    add("--seq-len", type=COUNT, default=SEQ_LEN, help="tokens of a piece (default: 1024)")
    group = parser.add_argument_group("format (the method's own where not given)")
    add = group.add_argument
    add("--bits", type=COUNT, help="of a weight")
    add("--group-size", type=int, help="inputs that share a scale; -1: all of an output's")
    switch: Any = argparse.BooleanOptionalAction
    add("--symmetric", action=switch, default=None, help="without zero points")
    add("--act-order", action=switch, default=None, help="round inputs by their size (gptq)")
    add("--damping", type=POSITIVE, metavar="X", help="of gptq's moments (default: 0.01)")
    for name in OPTIONS:
        add_option(parser, name)


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then quantize and tell what was written. Raises: QuireError."""
    begin = time.perf_counter()
    frontend = Frontend(EngineConfig.from_options(given_options(arguments)))
    try:
        if frontend.prepared.raw_config.get("quantization_config") is not None:
            raise ConfigError(
                f"{frontend.prepared.folder} is quantized already; take the full-precision model."
            )
        method = _method_of(frontend, arguments.method)
        samples = _samples(frontend, method, arguments)
        _warn_of_few(samples)
        from quire.quantize.run import quantize

        bar = _Bar()
        try:
            done = quantize(_job(frontend, method, samples, arguments), bar)
        finally:
            bar.end()
    finally:
        frontend.close()
    print(_summary(done, arguments.output, samples, time.perf_counter() - begin))
    return 0


def _method_of(frontend: Frontend, name: str) -> QuantizationPlugin:
    """Return the plugin that writes a format. Raises: ConfigError naming those that do."""
    registry = frontend.prepared.registry
    methods = [registry.quantization(known) for known in registry.names("quantization")]
    writers = {method.name: method for method in methods if method.quantizer is not None}
    if name not in writers:
        raise ConfigError(
            f"--method is {name!r}; installed methods that write checkpoints: "
            f"{', '.join(sorted(writers)) or 'none'}.{nearest(name, writers)}"
        )
    reason = registry.entry("quantization", name).unusable
    if reason is not None:
        raise ConfigError(f"--method {name} cannot be used here: {reason}")
    return writers[name]


def _samples(
    frontend: Frontend, method: QuantizationPlugin, arguments: argparse.Namespace
) -> list[list[int]]:
    """Return the token ids to calibrate with, none for a method that looks at weights alone."""
    quantizer = method.load_quantizer()
    if not getattr(quantizer, "needs_inputs", False):
        if arguments.calibration is not None:
            raise ConfigError(
                f"--calibration {arguments.calibration}: --method {method.name} is not calibrated; "
                "leave it out."
            )
        return []
    file = calibration_file(frontend, arguments.calibration)
    return read_samples(
        frontend, file, num_samples=arguments.num_samples, seq_len=arguments.seq_len
    )


def _warn_of_few(samples: list[list[int]]) -> None:
    """Say that a method was hardly calibrated; its errors would look small all the same."""
    found = sum(map(len, samples))
    if 0 < found < FEW_TOKENS:
        print(
            f"quire: warning: {found} tokens to calibrate with are too few to show what the model "
            f"will see; give a --calibration file with some ten thousand.",
            file=sys.stderr,
        )


def _job(
    frontend: Frontend,
    method: QuantizationPlugin,
    samples: list[list[int]],
    arguments: argparse.Namespace,
) -> Job:
    from quire.interfaces.quantization import QuantizerOptions
    from quire.quantize.run import Job

    options = QuantizerOptions(
        dtype=frontend.prepared.config.model.dtype,
        bits=arguments.bits,
        group_size=arguments.group_size,
        symmetric=arguments.symmetric,
        act_order=arguments.act_order,
        damping=arguments.damping,
    )
    return Job(
        prepared=frontend.prepared,
        method=method,
        options=options,
        samples=samples,
        output=arguments.output,
    )


class _Bar:
    """A bar of blocks on standard error, and a line for each linear above it."""

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, num_blocks: int, num_finished: int) -> None:
        """Show the bar, where an earlier run left it."""
        from tqdm import tqdm

        self._bar = tqdm(
            total=num_blocks, initial=num_finished, desc="Quantized", unit="block",
            file=sys.stderr, dynamic_ncols=True,
        )  # fmt: skip
        if num_finished:
            self._bar.write(f"{num_finished} of {num_blocks} blocks are done", file=sys.stderr)

    def linear(self, name: str, error: float) -> None:
        """Write a line above the bar."""
        self._bar.write(f"{name}: error {error:.2%}", file=sys.stderr)

    def block(self) -> None:
        """Move the bar."""
        self._bar.update()

    def end(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


def _summary(done: Done, output: Path, samples: list[list[int]], seconds: float) -> str:
    errors = list(done.errors.values())
    worst = max(done.errors, key=lambda name: done.errors[name])
    lines = [
        f"{output}: {done.bytes_before / 1e6:,.1f} MB of tensors became "
        f"{done.bytes_after / 1e6:,.1f} MB in {seconds:,.1f} s"
    ]
    if samples:
        lines.append(f"calibrated with {sum(map(len, samples)):,} tokens of {len(samples)} pieces")
    what = "outputs" if samples else "weights"
    lines.append(
        f"relative error of {what}: {sum(errors) / len(errors):.2%} in the mean, "
        f"{done.errors[worst]:.2%} at most ({worst})"
    )
    return "\n".join(lines)
