"""A connection is ended when its client takes nothing, and only then."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from attrs import define

from quire.server.slow_readers import SlowReaders


@define(eq=False)
class Connection:
    """A connection that is its own transport; `sizes` is what its buffer holds each second."""

    sizes: Sequence[int]
    now_s: int = 0
    ended_s: int | None = None

    @property
    def transport(self) -> Connection:
        return self

    def get_write_buffer_size(self) -> int:
        return self.sizes[min(self.now_s, len(self.sizes) - 1)]

    def abort(self) -> None:
        self.ended_s = self.now_s


@pytest.mark.parametrize(
    ("sizes", "ended_s"),
    [
        ([0], None),
        ([100], 4),
        ([0, 0, 100], 6),
        ([100, 99, 98, 97, 96], 8),
        ([100, 100, 100, 0, 100, 100, 100, 0], None),
        ([100, 100, 100, 200, 200], 4),
        ([*range(100, 0, -1), 0], None),
    ],
    ids=["empty", "stuck", "stuck later", "stops", "bursts", "grows", "slow"],
)
def test_connection_whose_buffer_does_not_shrink_is_ended(
    sizes: list[int], ended_s: int | None
) -> None:
    connection = Connection(sizes)
    connections = {connection}
    readers = SlowReaders(connections, timeout_s=3)

    for now_s in range(120):
        connection.now_s = now_s
        readers.look(now_s)
        if connection.ended_s is not None:
            connections.clear()

    assert connection.ended_s == ended_s
