"""Command-line options for SamplingParams; checked there, not here."""

from __future__ import annotations

import argparse
from typing import Any

from quire.request import SAMPLING_FIELDS

_NUMBERS = {
    "n": (int, "answers to each prompt"),
    "max_tokens": (int, "tokens to generate at most"),
    "min_tokens": (int, "tokens before which no end or stop token may come"),
    "temperature": (float, "0 is greedy"),
    "top_k": (int, "draw from the k most likely tokens; 0: from all"),
    "top_p": (float, "draw from the fewest tokens whose probability reaches this"),
    "min_p": (float, "drop tokens less likely than this share of the most likely one"),
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add one option for each parameter; defaults come from generation_config.json."""
    group = parser.add_argument_group("sampling (defaults: the model's generation_config.json)")
    for name, (kind, meaning) in _NUMBERS.items():
        group.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            default=argparse.SUPPRESS,
            type=_number(kind),
            metavar="N" if kind is int else "X",
            help=meaning,
        )
    group.add_argument(
        "--stop",
        action="append",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="end at this text, which is left out; may be repeated",
    )
    group.add_argument(
        "--stop-token-ids",
        action="append",
        type=_number(int),
        default=argparse.SUPPRESS,
        metavar="ID",
        help="end at this token; may be repeated",
    )
    group.add_argument(
        "--ignore-eos",
        action="store_true",
        default=argparse.SUPPRESS,
        help="go on after an end token",
    )


def given_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the parameters that were given. `seed` is the engine's, which seeds all requests."""
    given = vars(arguments)
    return {name: given[name] for name in SAMPLING_FIELDS if name in given and name != "seed"}


def _number(kind: type) -> Any:
    """Return how a text becomes a number; what is none stays a text, for the check to refuse."""

    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            return text

    return parse
