"""How many KV blocks there are and how long a sequence may become; integers only, no torch."""

from __future__ import annotations

from bisect import bisect_right

from attrs import evolve, frozen

from quire.errors import ConfigError
from quire.execution.memory import describe_bytes
from quire.scheduling.footprint import slabs_a_sequence
from quire.scheduling.output import KVCacheGroup


@frozen(kw_only=True)
class KVSize:
    """Blocks a group (block 0 included), the longest sequence, and why that long.

    `a_sequence` is how many of them one of that length holds at most, alone. Where groups share
    memory they are slabs.
    """

    num_blocks: int
    max_model_len: int
    a_sequence: int
    why: str


@frozen(kw_only=True)
class KVRequest:
    """What is asked for. `wanted_len` is a number, "auto", or None for the model's own length.

    `bytes_per_block` counts one block in all layers, or a slab where groups share them.
    `groups` say what their windows leave behind, steps of `max_step_tokens` at most; none: no layer
    has a window.
    """

    available_bytes: int
    bytes_per_block: int
    block_size: int
    max_num_seqs: int
    wanted_len: int | str | None
    model_len: int
    groups: tuple[KVCacheGroup, ...] = ()
    max_step_tokens: int = 1

    def blocks_for(self, length: int) -> int:
        """Return how many blocks, or slabs, a sequence of this length needs alone."""
        if not self.groups:
            return -(-length // self.block_size)
        return slabs_a_sequence(self.groups, length, self.max_step_tokens)

    def longest(self, blocks: int) -> int:
        """Return the longest length, of those that may be wanted, that so many blocks serve."""
        if all(group.window is None for group in self.groups):
            return max(0, blocks) * self.block_size
        wanted = self.wanted_len if isinstance(self.wanted_len, int) else 0
        lengths = range(1, max(self.model_len, wanted) + 1)
        return bisect_right(lengths, blocks, key=self.blocks_for)


def size_kv_cache(request: KVRequest) -> KVSize:
    """Divide the memory into blocks.

    Raises: ConfigError if not even one sequence of the wanted length fits, with the length and
    the memory that would do.
    """
    blocks = request.available_bytes // request.bytes_per_block
    fits = request.longest(blocks - 1)
    if fits == 0:
        least = request.blocks_for(1) + 1
        need = describe_bytes(least * request.bytes_per_block)
        raise ConfigError(
            f"no KV block fits in {describe_bytes(max(0, request.available_bytes))}; {least} "
            f"blocks of {request.block_size} tokens need {need}. Raise --kv-cache-memory-bytes, or "
            "lower --block-size."
        )
    if request.wanted_len == "auto":
        length = min(request.model_len, fits)
        why = "the model's own" if length == request.model_len else "the largest that fits"
    else:
        length = _checked_length(request, fits)
        why = "the model's own" if request.wanted_len is None else "as asked"
    # What windows have left behind may stay in the prefix cache.
    groups = tuple(evolve(group, window=None) for group in request.groups)
    most = request.max_num_seqs * evolve(request, groups=groups).blocks_for(length) + 1
    return KVSize(
        num_blocks=min(blocks, most),
        max_model_len=length,
        a_sequence=request.blocks_for(length),
        why=why,
    )


def size_without_cache(max_num_seqs: int, longest: int, why: str) -> KVSize:
    """Return the size where no layer keeps anything: a block a sequence, which holds nothing."""
    return KVSize(num_blocks=max_num_seqs + 1, max_model_len=longest, a_sequence=1, why=why)


def _checked_length(request: KVRequest, fits: int) -> int:
    length = request.model_len if request.wanted_len is None else request.wanted_len
    assert isinstance(length, int), length
    if length <= fits:
        return length
    need = (request.blocks_for(length) + 1) * request.bytes_per_block
    raise ConfigError(
        f"--max-model-len {length} does not fit: its KV blocks need {describe_bytes(need)}, "
        f"available are {describe_bytes(request.available_bytes)}. Use --max-model-len {fits} "
        f"or auto, or --kv-cache-memory-bytes {need}."
    )
