"""`quire bench offline|latency|prefill MODEL`: an engine in this process, without a server."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from quire.benchmark.prompts import Lengths, check_fits, draw_lengths
from quire.cli.numbers import COUNT, number
from quire.cli.options import add_options, given_options
from quire.config import EngineConfig
from quire.errors import ConfigError
from quire.frontend import Frontend

SUMMARIES = {
    "offline": "throughput: many requests of random lengths at once",
    "latency": "time a token of a small batch, and to its first token",
    "prefill": "time of one long prompt",
}
_MANY = Lengths(low=100, high=1024)
_DEFAULTS: dict[str, dict[str, Any]] = {
    "offline": {"num": 256, "input_len": _MANY, "output_len": _MANY, "temperature": 0.6},
    "latency": {
        "num": 1,
        "input_len": Lengths(low=128, high=128),
        "output_len": Lengths(low=64, high=576),
        "temperature": 0.0,
    },
    "prefill": {
        "num": 1,
        "input_len": Lengths(low=32000, high=32000),
        "output_len": Lengths(low=1, high=1),
        "temperature": 0.0,
    },
}
_COUNT_OPTION = {"offline": ("--num-requests", "requests"), "latency": ("--batch-size", "requests")}
# A cache would make all but the first run shorter; texts are not needed.
ENGINE_DEFAULTS = {"enable_prefix_caching": False, "skip_tokenizer_init": True}
_DEFAULT = " (default: %(default)s)"
EPILOG = """\
The engine's prefix cache is off and no tokenizer is loaded, unless options say otherwise. Prompts
are random token ids, other ones in each repeat; answers end by length alone.
"""


def _lengths(text: str) -> Lengths:
    try:
        return Lengths.parse(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no range; allowed: LOW:HIGH or N, whole numbers from 1"
        ) from None


def add_arguments(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare the arguments of one of the benchmarks."""
    defaults = _DEFAULTS[what]
    parser.set_defaults(**defaults)
    parser.add_argument("model", help="folder, Hugging Face id, or bundled checkpoint (`demo`)")
    group = parser.add_argument_group("benchmark")
    add = group.add_argument
    if what in _COUNT_OPTION:
        name, meaning = _COUNT_OPTION[what]
        add(name, dest="num", type=COUNT, help=f"{meaning} at once{_DEFAULT}")
    add("--input-len", type=_lengths, metavar="LOW:HIGH", help=f"prompt tokens{_DEFAULT}")
    if what != "prefill":
        add("--output-len", type=_lengths, metavar="LOW:HIGH", help=_output_help(what) + _DEFAULT)
        add("--temperature", type=number(float, 0), help=f"0 is greedy{_DEFAULT}")
    add(
        "--repeats",
        type=COUNT,
        default=3,
        help=f"runs that are measured, after one that is not{_DEFAULT}",
    )
    add(
        "--ceilings",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="measure copies and products of the device too; not given: on a GPU",
    )
    add("--profile", type=Path, metavar="DIR", help="record steps into a Chrome trace there")
    add("--profile-steps", type=COUNT, default=8, help=f"steps that are recorded{_DEFAULT}")
    add("--json", action="store_true", help="print one JSON object")
    add_options(parser, without=("model",))


def _output_help(what: str) -> str:
    if what == "latency":
        return "time a token is taken between these two tokens of the answer"
    return "tokens to generate"


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then load, measure and print. Raises: QuireError."""
    what = arguments.what
    lengths, stamps = _lengths_of(arguments)
    _make_folder(arguments.profile)
    given = {**ENGINE_DEFAULTS, **given_options(arguments)}
    frontend = Frontend(EngineConfig.from_options(given))
    try:
        check_fits(lengths, frontend.max_model_len)
        with frontend.prepared.phases.timed("imports"):
            from quire.benchmark.engine_bench import Plan, measure

        plan = Plan(
            what=what,
            lengths=lengths,
            temperature=arguments.temperature,
            repeats=arguments.repeats,
            seed=frontend.config.device.seed,
            workload=_workload(arguments),
            stamps=stamps,
            ceilings=arguments.ceilings,
            profile=arguments.profile,
            profile_steps=arguments.profile_steps,
        )
        report = measure(frontend, plan)
    finally:
        frontend.close()
    from quire.benchmark.report import as_text

    print(json.dumps(report) if arguments.json else as_text(report))
    return 0


def _make_folder(folder: Path | None) -> None:
    """Make the folder of a trace before anything takes time."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--profile {folder} cannot be written: {error}.") from error


def _lengths_of(arguments: argparse.Namespace) -> tuple[list[tuple[int, int]], Lengths]:
    """Return the lengths of all requests, and the tokens between which time is taken."""
    input_len, stamps = arguments.input_len, arguments.output_len
    output_len = stamps
    if arguments.what == "latency":
        if stamps.low == stamps.high:
            raise ConfigError(f"--output-len is {stamps}; allowed: LOW:HIGH with LOW below HIGH.")
        output_len = Lengths(low=stamps.high, high=stamps.high)
    seed = getattr(arguments, "seed", 0)
    return draw_lengths(arguments.num, input_len, output_len, seed), stamps


def _workload(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "requests": arguments.num,
        "input_len": str(arguments.input_len),
        "output_len": str(arguments.output_len),
        "temperature": arguments.temperature,
    }
