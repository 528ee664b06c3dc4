"""`quire bench WHAT`: measure a server, ours or another's, or an engine in this process."""

from __future__ import annotations

import argparse

from quire.cli import bench_attention, bench_engine, bench_serve, bench_startup


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
    attention = below.add_parser(
        "attention",
        help=bench_attention.SUMMARY,
        description=f"Measure {bench_attention.SUMMARY}.",
        epilog=bench_attention.EPILOG,
        allow_abbrev=False,
    )
    bench_attention.add_arguments(attention)
    startup = below.add_parser(
        "startup",
        help=bench_startup.SUMMARY,
        description=f"Measure {bench_startup.SUMMARY}.",
        epilog=bench_startup.EPILOG,
        allow_abbrev=False,
    )
    bench_startup.add_arguments(startup)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; 1 if a request to a server failed. Raises: QuireError."""
    if arguments.what == "serve":
        return bench_serve.run(arguments)
    if arguments.what == "attention":
        return bench_attention.run(arguments)
    if arguments.what == "startup":
        return bench_startup.run(arguments)
    return bench_engine.run(arguments)
