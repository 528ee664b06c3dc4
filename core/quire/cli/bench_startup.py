"""`quire bench startup MODEL`: from `import quire` to the first token, in fresh processes."""

from __future__ import annotations

import argparse
import json

from quire.benchmark.report import as_text
from quire.benchmark.startup import measure_starts
from quire.cli.numbers import COUNT
from quire.cli.options import add_options, given_options
from quire.config import EngineConfig
from quire.frontend import Frontend

SUMMARY = "seconds from `import quire` to the first token"
CACHES = {"cold": ("cold",), "warm": ("warm",), "both": ("cold", "warm")}
EPILOG = """\
cold: each start has empty folders for compiled kernels; warm: your own, filled by a start before.
Nothing of yours is removed, and the system's cache of files is left as it is.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire bench startup`."""
    parser.add_argument("model", help="folder, Hugging Face id, or bundled checkpoint (`demo`)")
    add = parser.add_argument_group("benchmark").add_argument
    add("--cache", choices=CACHES, default="both", help="of compiled kernels (default: both)")
    add("--repeats", type=COUNT, default=3, help="starts of each kind (default: 3)")
    add("--json", action="store_true", help="print one JSON object")
    add_options(parser, without=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Check everything here, then start, measure and print. Raises: QuireError."""
    config = EngineConfig.from_options(given_options(arguments))
    frontend = Frontend(config)
    frontend.close()
    options = config.to_options()
    found = measure_starts(options, CACHES[arguments.cache], arguments.repeats)
    report = {
        "benchmark": "startup",
        "model": frontend.prepared.describe(),
        "machine": found["machine"],
        "choices": found["choices"],
        "settings": {name: value for name, value in options.items() if name != "model"},
        "workload": {"cache": arguments.cache, "repeats": arguments.repeats, "unit": "seconds"},
        "figures": found["figures"],
    }
    print(json.dumps(report) if arguments.json else as_text(report))
    return 0
