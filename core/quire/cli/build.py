"""`quire build NAME`: compile a plugin's native code ahead of its use."""

from __future__ import annotations

import argparse
import sys

from quire.cli.options import add_option, given_options
from quire.errors import BuildError, ConfigError
from quire.hooks import builds
from quire.hooks.registry import Registry, load_plugins
from quire.hooks.validation import Registered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire build`."""
    parser.add_argument("names", metavar="NAME", nargs="*", help="a plugin with code to compile")
    parser.add_argument("--all", action="store_true", help="build every plugin that can be built")
    add_option(parser, "disable_plugin")


def run(arguments: argparse.Namespace) -> int:
    """Build one plugin after another: progress on stderr, a line each on stdout.

    What fails keeps none of the others from being built. Raises: ConfigError for an unknown name,
    BuildError with the compiler's first error, or how many failed of several.
    """
    registry = load_plugins(given_options(arguments).get("disable_plugin", ()))
    wanted = _wanted(registry, arguments.names, everything=arguments.all)
    if len(wanted) == 1:
        _build(wanted[0])
        return 0
    num_failed = 0
    for entry in wanted:
        try:
            _build(entry)
        except BuildError as error:
            num_failed += 1
            print(f"quire: error: {error}", file=sys.stderr)
    if num_failed:
        raise BuildError(f"{num_failed} of {len(wanted)} plugins were not built; see above.")
    return 0


def _build(entry: Registered) -> None:
    def say(line: str) -> None:
        print(f"{entry.name}: {line}", file=sys.stderr, flush=True)

    try:
        print(f"{entry.name}: {builds.build(entry, say)}", flush=True)
    except BuildError as error:
        raise BuildError(f"{entry.kind} {entry.name!r} cannot be built: {error}") from error


def _wanted(registry: Registry, names: list[str], *, everything: bool) -> list[Registered]:
    """Return what to build, each once, and say what needs none. Raises: ConfigError."""
    if everything == bool(names):
        known = sorted({entry.name for entry in builds.buildable(registry)})
        raise ConfigError(
            f"name what to build, or give --all. "
            f"What can be built: {', '.join(known) or 'nothing'}."
        )
    if everything:
        return builds.buildable(registry)
    found = {name: builds.named(registry, name) for name in names}
    for name, entries in found.items():
        if not entries:
            print(f"{name}: nothing needs building")
    return [entry for entries in found.values() for entry in entries]
