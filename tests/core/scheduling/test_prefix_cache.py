"""Keys of blocks, and the order in which findable blocks are evicted."""

from __future__ import annotations

import hashlib
import struct

import pytest

from quire.scheduling.prefix_cache import PrefixCache, extend_chain, salt_digest


def chain_of(token_ids: list[int], *, salt: str = "", block_size: int = 2) -> list[bytes]:
    chain: list[bytes] = []
    extend_chain(chain, token_ids, block_size, len(token_ids) // block_size, salt)
    return chain


def test_block_key_is_sha256_of_parent_and_fixed_width_tokens() -> None:
    first = hashlib.sha256(salt_digest("") + struct.pack("=2i", 5, 600)).digest()
    second = hashlib.sha256(first + struct.pack("=2i", 7, 8)).digest()

    assert chain_of([5, 600, 7, 8]) == [first, second]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        pytest.param(chain_of([1, 2, 3, 4]), chain_of([9, 2, 3, 4]), id="another parent"),
        pytest.param(chain_of([1, 2, 3, 4]), chain_of([1, 2, 4, 3]), id="another order"),
        pytest.param(chain_of([1, 2]), chain_of([1, 2], salt="tenant"), id="another salt"),
        pytest.param(chain_of([1, 23]), chain_of([12, 3]), id="equal digits"),
    ],
)
def test_block_key_differs(left: list[bytes], right: list[bytes]) -> None:
    assert left[-1] != right[-1]


def test_chain_hashes_only_the_blocks_that_are_new() -> None:
    chain = chain_of([1, 2])
    kept = chain[0]

    extend_chain(chain, [99, 99, 3, 4], 2, 2, "")

    assert chain[0] is kept
    assert chain[1] == chain_of([1, 2, 3, 4])[1]


def test_salt_may_hold_any_text() -> None:
    assert salt_digest("\ud800") != salt_digest("")


def test_cache_keeps_the_first_of_two_equal_blocks() -> None:
    cache = PrefixCache()

    cache.add(b"key", 3)
    cache.add(b"key", 4)

    assert cache.find(b"key") == 3
    assert not cache.holds(4)


def test_cache_evicts_the_least_recently_used_idle_block() -> None:
    cache = PrefixCache()
    for block_id in (1, 2, 3):
        cache.add(bytes([block_id]), block_id)
        cache.retire(block_id)
    cache.revive(1)
    cache.retire(1)

    assert [cache.evict() for _ in range(3)] == [2, 3, 1]


def test_cache_never_evicts_a_block_in_use() -> None:
    cache = PrefixCache()
    for block_id in (1, 2):
        cache.add(bytes([block_id]), block_id)
    cache.retire(2)

    cache.evict()

    assert cache.find(bytes([1])) == 1
    assert cache.num_idle == 0


def test_cache_forgets_all_blocks_at_reset_and_returns_the_idle_ones() -> None:
    cache = PrefixCache()
    cache.add(b"in use", 1)
    cache.add(b"idle", 2)
    cache.retire(2)

    assert cache.reset() == [2]
    assert len(cache) == 0
    assert not cache.holds(1)
