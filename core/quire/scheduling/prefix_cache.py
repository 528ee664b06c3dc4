"""Which finished KV blocks hold which tokens, so that an equal beginning is not computed twice.

A block's key is SHA-256 over its parent's key and its token ids, so that equal keys mean equal
beginnings; the salt stands in for the first block's parent, so tenants never meet.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from hashlib import sha256


def salt_digest(salt: str) -> bytes:
    """Return what stands for the parent of a first block."""
    return sha256(b"quire prefix cache\0" + salt.encode("utf-8", "surrogatepass")).digest()


def block_digest(parent: bytes, token_ids: Iterable[int]) -> bytes:
    """Return the key of the block with these tokens after the block with key `parent`."""
    return sha256(parent + array("i", token_ids).tobytes()).digest()


def extend_chain(
    chain: list[bytes], token_ids: list[int], block_size: int, num_blocks: int, salt: str
) -> None:
    """Append the keys of further full blocks to `chain` until it has `num_blocks`."""
    parent = chain[-1] if chain else salt_digest(salt)
    for start in range(len(chain) * block_size, num_blocks * block_size, block_size):
        parent = block_digest(parent, token_ids[start : start + block_size])
        chain.append(parent)


class PrefixCache:
    """The findable blocks of one group; those that no table names wait here to be evicted.

    It knows keys and block ids only; who references a block is the pool's business.
    """

    __slots__ = ("_block_ids", "_digests", "_idle")

    def __init__(self) -> None:
        self._block_ids: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._block_ids)

    @property
    def num_idle(self) -> int:
        """Findable blocks that no table names."""
        return len(self._idle)

    def find(self, digest: bytes) -> int | None:
        """Return the block with this key; changes nothing, so the caller takes its reference."""
        return self._block_ids.get(digest)

    def holds(self, block_id: int) -> bool:
        """Whether the block can be found, so that nobody may write to it."""
        return block_id in self._digests

    def is_idle(self, block_id: int) -> bool:
        """Whether the block can be found and no table names it."""
        return block_id in self._idle

    def add(self, digest: bytes, block_id: int) -> None:
        """Make a finished block findable.

        Where two sequences computed the same block at once, the first stays and the second is
        not cached.
        """
        if digest not in self._block_ids:
            self._block_ids[digest] = block_id
            self._digests[block_id] = digest

    def retire(self, block_id: int) -> None:
        """Keep a block that its last table gave up, as the most recently used."""
        self._idle[block_id] = None

    def revive(self, block_id: int) -> None:
        """Take a block that a table names again out of the order of eviction."""
        del self._idle[block_id]

    def evict(self) -> int:
        """Forget the least recently used idle block and return it, free for other contents."""
        block_id, _ = self._idle.popitem(last=False)
        del self._block_ids[self._digests.pop(block_id)]
        return block_id

    def forget(self, block_id: int) -> None:
        """Make a block that is not idle unfindable; nothing changes where it is that already."""
        digest = self._digests.pop(block_id, None)
        if digest is not None:
            del self._block_ids[digest]

    def reset(self) -> list[int]:
        """Forget everything and return the idle blocks, which are free now."""
        idle = list(self._idle)
        self._block_ids.clear()
        self._digests.clear()
        self._idle.clear()
        return idle
