"""`quire bench WHAT`: measure a server, ours or another's, or an engine in this process."""

from __future__ import annotations

import argparse
from typing import Any

from quire.cli import bench_attention, bench_engine, bench_quality, bench_serve, bench_startup

ONE_MODULE: dict[str, Any] = {
    "attention": bench_attention,
    "startup": bench_startup,
    "quality": bench_quality,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire bench`."""
    below = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    serve = below.add_parser(
        "serve",
        help="load a server",
        description="Load an OpenAI-compatible server, ours or another's, and measure it.",
        epilog=bench_serve.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    bench_serve.add_arguments(serve)
    for what, summary in bench_engine.SUMMARIES.items():
        one = below.add_parser(
            what,
            help=summary,
            description=f"Measure {summary}.",
            epilog=bench_engine.EPILOG,
            allow_abbrev=False,
        )
        bench_engine.add_arguments(one, what)
    for what, module in ONE_MODULE.items():
        one = below.add_parser(
            what,
            help=module.SUMMARY,
            description=f"Measure {module.SUMMARY}.",
            epilog=module.EPILOG,
            allow_abbrev=False,
        )
        module.add_arguments(one)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 1 if a request to a server failed. Raises: QuireError."""
    if arguments.what == "serve":
        return bench_serve.run(arguments)
    if arguments.what in ONE_MODULE:
        code: int = ONE_MODULE[arguments.what].run(arguments)
        return code
    return bench_engine.run(arguments)
