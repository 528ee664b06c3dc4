"""`quire plugins check NAME`: run the conformance kit on what is installed."""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys

from quire.cli.options import given_options
from quire.config import nearest
from quire.errors import ConfigError
from quire.hooks.kinds import KINDS
from quire.hooks.registry import Registry, load_plugins

PROFILES = ("quick", "full")
DEVICES = ("cpu", "cuda")
# The kinds that the kit knows; a bundled checkpoint holds no code.
CHECKED = (
    *("attention", "quantization", "sampler", "logits-processor", "model"),
    *("grammar", "tool-call-parser", "reasoning-parser"),
)
OPS = "quire_kernels.ops"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire plugins check`."""
    parser.add_argument(
        "name", metavar="NAME", nargs="?", help=f"a plugin of one of the kinds {', '.join(CHECKED)}"
    )
    parser.add_argument(
        "--ops",
        metavar="MODULE",
        nargs="?",
        const=OPS,
        help=f"instead of a plugin, the operations of a module (default: {OPS})",
    )
    parser.add_argument(
        "--profile",
        choices=PROFILES,
        default="quick",
        help="quick: a few seconds (default); full: a minute, longer sequences and wider heads",
    )
    parser.add_argument(
        "--device", choices=DEVICES, default="cpu", help="where it runs (default: cpu)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="draws the cases; the same seed draws the same ones"
    )
    # The list of plugins has these too; what is not given here must not undo what is given there.
    parser.add_argument(
        "--kind",
        metavar="KIND",
        default=argparse.SUPPRESS,
        help="where several kinds have a plugin NAME",
    )
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print a JSON object"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a line a check, and what is wrong. Return 1 where a check failed.

    Raises: ConfigError for a name that cannot be checked, or a device that is not there.
    """
    if arguments.name is None and arguments.ops is None:
        raise ConfigError("the following arguments are required: NAME, or --ops instead of it.")
    if arguments.name is not None and arguments.ops is not None:
        raise ConfigError(
            f"the plugin {arguments.name!r} and --ops are both given; one is checked at a time, "
            f"so leave one out."
        )
    if arguments.ops is not None:
        kind, name, registry = "ops", arguments.ops, None
    else:
        registry = load_plugins(given_options(arguments).get("disable_plugin", ()))
        name = arguments.name
        kind = _kind_of(registry, name, getattr(arguments, "kind", None))
    # A kernel that reads where it must not may end the process: then say where it was.
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    # Here, so that a name that is unknown needs neither torch nor hypothesis.
    from quire.testing import installed
    from quire.testing.kit_report import Report

    settings = installed.Settings(
        profile=arguments.profile, device=arguments.device, seed=arguments.seed
    )
    if registry is None:
        checked = installed.iter_module(name, settings)
    else:
        checked = installed.iter_plugin(registry, kind, name, settings)
    seed, as_json = arguments.seed, getattr(arguments, "json", False)
    results = []
    for result in checked:
        results.append(result)
        if not as_json:
            print(result, flush=True)
            if result.outcome == "failed":
                print(f"  {result.detail}\n  seed: {seed}", flush=True)
    report = Report(
        kind=kind,
        name=name,
        profile=arguments.profile,
        device=arguments.device,
        seed=seed,
        checks=results,
    )
    print(json.dumps(report.as_dict(), indent=2) if as_json else report.summary())
    return 0 if report.passed else 1


def _kind_of(registry: Registry, name: str, asked: str | None) -> str:
    """Return the kind of the plugin that is meant.

    Raises: ConfigError where there is none, or several.
    """
    if asked is not None:
        if asked not in CHECKED:
            allowed = f"allowed: {', '.join(CHECKED)}.{nearest(asked, CHECKED)}"
            raise ConfigError(f"--kind is {asked!r}; {allowed}")
        return registry.entry(asked, name).kind
    found = [kind for kind in CHECKED if name in registry.names(kind)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(
            f"several kinds have a plugin {name!r}: {', '.join(found)}. "
            f"Say which: --kind {found[0]}."
        )
    for kind in KINDS.values():
        if name in registry.names(kind.name):
            raise ConfigError(
                f"{name!r} is a {kind.title}, which the kit does not check; "
                f"it checks: {', '.join(CHECKED)}."
            )
    known = sorted({one for kind in CHECKED for one in registry.names(kind)})
    raise ConfigError(
        f"unknown plugin {name!r}; installed: {', '.join(known)}.{nearest(name, known)} "
        f"`quire plugins` lists all; a new plugin appears after its package is installed."
    )
