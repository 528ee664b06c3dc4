"""`quire plugins check NAME`: run the conformance kit on an installed attention backend."""

from __future__ import annotations

import argparse
import json

from quire.cli.options import given_options
from quire.errors import ConfigError
from quire.hooks.kinds import KINDS
from quire.hooks.registry import Registry, load_plugins
from quire.hooks.selection import require_attention

PROFILES = ("quick", "full")
DEVICES = ("cpu", "cuda")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `quire plugins check`."""
    parser.add_argument("name", metavar="NAME", help="an attention backend")
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
        "--json", action="store_true", default=argparse.SUPPRESS, help="print a JSON object"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a line a check, and what is wrong. Return 1 where a check failed.

    Raises: ConfigError for a name that cannot be checked, or a device that is not there.
    """
    registry = load_plugins(given_options(arguments).get("disable_plugin", ()))
    plugin, backend = require_attention(registry, _attention_name(registry, arguments.name))
    from quire.testing import kit

    kit.check_device(arguments.device)
    seed, as_json = arguments.seed, getattr(arguments, "json", False)
    checked = kit.iter_attention(
        backend,
        profile=arguments.profile,
        device=arguments.device,
        options={key: option.default for key, option in plugin.options.items()},
        seed=seed,
    )
    results = []
    for result in checked:
        results.append(result)
        if not as_json:
            print(result, flush=True)
            if result.outcome == "failed":
                print(f"  {result.detail}\n  seed: {seed}", flush=True)
    report = kit.Report(
        kind="attention",
        name=plugin.name,
        profile=arguments.profile,
        device=arguments.device,
        seed=seed,
        checks=results,
    )
    print(json.dumps(report.as_dict(), indent=2) if as_json else report.summary())
    return 0 if report.passed else 1


def _attention_name(registry: Registry, name: str) -> str:
    """Return the name of an attention backend. Raises: ConfigError for one of another kind."""
    if name in registry.names("attention"):
        return name
    for kind in KINDS.values():
        if name in registry.names(kind.name):
            raise ConfigError(
                f"{name!r} is a {kind.title}; this version checks attention backends alone: "
                f"{', '.join(registry.names('attention'))}."
            )
    return registry.entry("attention", name).name
