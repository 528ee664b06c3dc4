"""`quire serve MODEL`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import os

from quire.cli.options import add_options, add_rows, given_options
from quire.config import EngineConfig
from quire.frontend import Frontend
from quire.server.options import SERVER_OPTIONS, ServerOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire serve`."""
    parser.add_argument("model", help="folder, Hugging Face id, or bundled checkpoint (`demo`)")
    add_rows(parser, "server", SERVER_OPTIONS.values())
    add_options(parser, without=("model",))


def run(arguments: argparse.Namespace) -> int:
    """Check everything, then serve until a signal comes."""
    given = {n: value for n, value in vars(arguments).items() if n in SERVER_OPTIONS}
    options = ServerOptions.from_options(given)
    config = EngineConfig.from_options({**_defaults(), **given_options(arguments)})
    frontend = Frontend(config)
    try:
        from quire.server.run import serve

        return serve(frontend, options)
    finally:
        frontend.close()


def _defaults() -> dict[str, int]:
    """Leave one core to the server itself: two busy threads on one core stall each other."""
    return {"num_threads": max(1, (os.cpu_count() or 2) - 1)}
