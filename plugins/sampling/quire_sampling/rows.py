"""What the shipped logits processors share: a request's arguments, and the rows that have some."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from quire.config import nearest
from quire.errors import RequestError, shown

ROWS_AT_ONCE = 32


@frozen(kw_only=True)
class Number:
    """A number that a request may give: its default and its bounds, both allowed."""

    default: float
    low: float
    high: float
    is_whole: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raise RequestError for anything else."""
        kinds = (int,) if self.is_whole else (int, float)
        if type(value) not in kinds or not self.low <= value <= self.high:
            kind = "whole numbers" if self.is_whole else "numbers"
            raise refuse(name, value, f"{kind} from {self.low:g} to {self.high:g}")


def refuse(name: str, value: Any, allowed: str) -> RequestError:
    """Return the error of an argument."""
    return RequestError(f"{name} is {shown(value)}; allowed: {allowed}.", parameter="extra_args")


def numbers_of(
    processor: str, given: Any, known: Mapping[str, Number], others: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return the value of each known argument, checked. True and {} ask for the defaults.

    Raises: RequestError for an unknown name or a value out of its bounds.
    """
    if given is True:
        given = {}
    names = (*known, *others)
    if not isinstance(given, Mapping):
        raise refuse(processor, given, f"true, or an object with {', '.join(names)}")
    for name in given:
        if name not in names:
            hint = nearest(str(name)[:60], names)
            unknown = str(name)[:60]
            raise RequestError(
                f"{processor} has no argument {unknown!r}.{hint} It has {', '.join(names)}.",
                parameter="extra_args",
            )
    for name, number in known.items():
        if name in given:
            number.check(f"{processor}.{name}", given[name])
    return {name: given.get(name, number.default) for name, number in known.items()}


@frozen(kw_only=True)
class Chosen:
    """Some rows of a step that ask: places in the logits, persistent rows; int64 [num_chosen]."""

    host_rows: list[int]
    places: Tensor
    rows: Tensor


class AskingRows:
    """Which persistent rows ask for a processor, with their numbers on the device."""

    def __init__(self, names: tuple[str, ...], max_num_seqs: int, device: str) -> None:
        self._device = device
        self._names = names
        shape = (len(names), max_num_seqs)
        self._columns = torch.zeros(shape, dtype=torch.float64, device=device)
        self._asking: set[int] = set()
        self._chosen: tuple[list[int], list[Chosen]] = ([], [])

    def put(self, row: int, values: Mapping[str, Any] | None) -> None:
        """Take a row's numbers; None: it asks for nothing."""
        self._chosen = ([], [])
        self._asking.discard(row)
        if values is not None:
            self._asking.add(row)
            numbers = [float(values[name]) for name in self._names]
            self._columns[:, row] = torch.tensor(numbers, dtype=torch.float64)

    def choose(self, host_rows: list[int]) -> list[Chosen]:
        """Return those of a step's rows that ask, a few at a time, as they need memory.

        They are mostly the same as in the step before.
        """
        if self._asking and self._chosen[0] != host_rows:
            pairs = [(i, row) for i, row in enumerate(host_rows) if row in self._asking]
            parts = [pairs[i : i + ROWS_AT_ONCE] for i in range(0, len(pairs), ROWS_AT_ONCE)]
            self._chosen = (list(host_rows), [self._to_device(part) for part in parts])
        return self._chosen[1] if self._asking else []

    def _to_device(self, pairs: list[tuple[int, int]]) -> Chosen:
        places, rows = torch.tensor(pairs, dtype=torch.int64).to(self._device).unbind(1)
        return Chosen(host_rows=[row for _, row in pairs], places=places, rows=rows)

    def column(self, name: str, chosen: Chosen) -> Tensor:
        """Return a number of each row, float64 [num_chosen, 1]."""
        column = self._columns[self._names.index(name)]
        return column.index_select(0, chosen.rows).unsqueeze(1)
