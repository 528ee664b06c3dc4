"""The device's block tables follow the host's, told of differences alone."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_batch import make_groups

from quire.execution.block_tables import BlockTables
from quire.interfaces.attention import BatchLimits

LIMITS = BatchLimits(max_num_seqs=3, max_num_batched_tokens=64, max_model_len=16)
Change = tuple[int, bool, int, list[int]]
IDS = st.lists(st.integers(1, 99), max_size=3)
# A row, whether its table is changed from a place on, that place (modulo its length), and ids.
CHANGES = st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 9), IDS), max_size=12)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(CHANGES, max_size=4))
def test_device_tables_equal_the_host_after_each_step(
    steps: list[list[tuple[int, bool, int, list[int]]]],
) -> None:
    tables = BlockTables(make_groups([1]), LIMITS, torch.device("cpu"))
    tables._shares_memory = False
    tables._device = [torch.zeros_like(table) for table in tables._device]
    expected: list[list[int]] = [[], [], []]
    for changes in steps:
        touched: set[int] = set()
        for row, cuts, place, ids in changes:
            if row in touched or len(expected[row]) + len(ids) > LIMITS.max_model_len:
                continue
            touched.add(row)
            begin = place % (len(expected[row]) + 1) if cuts else len(expected[row])
            if cuts:
                tables.change(0, row, begin, ids)
            else:
                tables.append(0, row, ids)
            expected[row][begin:] = ids
        for group, places, ids in tables.take_changes():
            tables.tell_device(group, torch.from_numpy(places), torch.from_numpy(ids))
        for row, wanted in enumerate(expected):
            assert tables.gather(0, torch.tensor([row]))[0, : len(wanted)].tolist() == wanted
            assert tables._host[0][row, : len(wanted)].tolist() == wanted
