"""Command-line options made from the option table of `quire.config`; checked there, not here."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from typing import Any

from quire.config import OPTIONS, Option, option_name

GROUPS = {
    "model": "model",
    "cache": "KV cache",
    "scheduler": "scheduling",
    "plugins": "plugins",
    "device": "device",
}
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt])(?:i?b)?", re.IGNORECASE)
_POWERS = {"k": 10, "m": 20, "g": 30, "t": 40}


def add_options(parser: argparse.ArgumentParser, *, without: Iterable[str] = ()) -> None:
    """Add one command-line option for each row of the table but those in `without`."""
    for part, title in GROUPS.items():
        group = parser.add_argument_group(title)
        for row in OPTIONS.values():
            if row.part == part and row.name not in without:
                _add_option(group, row)


def add_rows(parser: argparse.ArgumentParser, title: str, rows: Iterable[Option]) -> None:
    """Add one command-line option for each row of another table, in a group of its own."""
    group = parser.add_argument_group(title)
    for row in rows:
        _add_option(group, row)


def add_option(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the command-line option for one row of the table."""
    _add_option(parser, OPTIONS[name])


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given, and no others, for `EngineConfig.from_options`."""
    return {name: value for name, value in vars(arguments).items() if name in OPTIONS}


def _add_option(group: Any, row: Option) -> None:
    keywords: dict[str, Any] = {"dest": row.name, "default": argparse.SUPPRESS, "help": _help(row)}
    if row.kind is bool:
        keywords["action"] = argparse.BooleanOptionalAction
    elif row.kind is tuple:
        keywords.update(action=_AppendNames, metavar="NAME")
    else:
        keywords.update(type=_parser_of(row), metavar=_metavar(row))
    group.add_argument(option_name(row.name), **keywords)


class _AppendNames(argparse.Action):
    """Collect names from repeated options; commas separate them, unless one is NAME=VALUE."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        _option_string: str | None = None,
    ) -> None:
        names = [values] if "=" in values else [name.strip() for name in values.split(",")]
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), *names))


def _parser_of(row: Option) -> Any:
    """Return how a text becomes a value; what is no number stays a text, for the table to check."""
    if row.unit == "bytes":
        return parse_bytes
    return {int: _whole, float: _real}.get(row.kind, str)


def parse_bytes(text: str) -> int | str:
    """Return a number of bytes from a text such as 1048576, 512M or 1.5GiB (powers of 1024)."""
    found = _BYTES.fullmatch(text.strip())
    if found is None:
        return _whole(text)
    return int(float(found[1]) * 2 ** _POWERS[found[2].lower()])


def _whole(text: str) -> int | str:
    return int(text) if re.fullmatch(r"[+-]?\d{1,19}", text.strip()) else text


def _real(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _metavar(row: Option) -> str:
    if row.choices:
        return "{" + ",".join(row.choices) + "}"
    if row.unit == "bytes":
        return "BYTES"
    return {int: "N", float: "X"}.get(row.kind, "TEXT")


def _help(row: Option) -> str:
    notes = [] if row.kind in (bool, tuple) else [f"allowed: {row.allowed}"]
    notes += [f"unit: {row.unit}" + _suffixes(row)] if row.unit else []
    notes += [f"default: {_shown(row.default)}"] if row.default not in (None, ()) else []
    text = row.meaning + (f" ({'; '.join(notes)})" if notes else "")
    return text.replace("%", "%%")


def _suffixes(row: Option) -> str:
    return ", or with K, M, G, T" if row.unit == "bytes" else ""


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
