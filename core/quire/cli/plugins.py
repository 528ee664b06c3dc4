"""`quire plugins`: what is installed, who brought it, does it work here; `check`: is it right."""

from __future__ import annotations

import argparse
import json
from typing import Any

from quire.cli import plugins_check
from quire.cli.options import add_option, given_options
from quire.config import nearest
from quire.errors import ConfigError
from quire.hooks.builds import not_built
from quire.hooks.kinds import KINDS
from quire.hooks.registry import Registry, load_plugins
from quire.hooks.validation import Registered

COLUMNS = ("kind", "name", "plugin", "distribution", "version", "api_version", "usable", "summary")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire plugins`."""
    parser.add_argument("--kind", metavar="KIND", help=f"only one kind: {', '.join(KINDS)}")
    parser.add_argument(
        "--architectures", action="store_true", help="list what models claim, and who builds it"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    add_option(parser, "disable_plugin")
    below = parser.add_subparsers(dest="action", metavar="ACTION", title="actions")
    check = below.add_parser(
        "check",
        help="prove a plugin right, or say what is wrong with it",
        description="Run the conformance kit on a plugin. 0: it passed; 1: it did not.",
        allow_abbrev=False,
    )
    plugins_check.add_arguments(check)


def run(arguments: argparse.Namespace) -> int:
    """Print the plugins, or check one. Raises: PluginError for the first that cannot be loaded."""
    if arguments.action == "check":
        return plugins_check.run(arguments)
    kind = arguments.kind
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"--kind is {kind!r}; allowed: {', '.join(KINDS)}.{nearest(kind, KINDS)}")
    disabled = given_options(arguments).get("disable_plugin", ())
    if arguments.architectures:
        return _list_architectures(load_plugins(disabled), as_json=arguments.json)
    rows = [_row(entry) for entry in load_plugins(disabled).entries(kind)]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    return 0


def _list_architectures(registry: Registry, *, as_json: bool) -> int:
    """Print each architecture that is claimed, and the models that build it, the best first."""
    found = {name: [m.name for m in registry.models_for(name)] for name in registry.architectures()}
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    width = max(map(len, found), default=0)
    for name, models in found.items():
        print(f"{name:<{width}}  {', '.join(models)}")
    return 0


def _row(entry: Registered) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "plugin": entry.owner.plugin,
        "distribution": entry.owner.distribution,
        "version": entry.owner.version,
        "api_version": ".".join(map(str, entry.api_version)),
        "usable": entry.unusable is None,
        "why_unusable": entry.unusable,
        "built": entry.is_built(),
        "summary": entry.descriptor.summary,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    shown = [{**row, "usable": row["why_unusable"] or _once_built(row)} for row in rows]
    lines = [{name: name.replace("_", " ") for name in COLUMNS}, *shown]
    widths = {name: max(len(str(line[name])) for line in lines) for name in COLUMNS}
    for line in lines:
        print("  ".join(f"{line[name]!s:<{widths[name]}}" for name in COLUMNS).rstrip())


def _once_built(row: dict[str, Any]) -> str:
    return "yes" if row["built"] else not_built(row["name"])
