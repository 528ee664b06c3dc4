"""How many KV blocks there are and how long a sequence may become; integers only, no torch."""

from __future__ import annotations

from attrs import frozen

from quire.errors import ConfigError
from quire.execution.memory import describe_bytes


@frozen(kw_only=True)
class KVSize:
    """Blocks a group (block 0 included), the longest sequence, and why that long."""

    num_blocks: int
    max_model_len: int
    why: str


@frozen(kw_only=True)
class KVRequest:
    """What is asked for. `wanted_len` is a number, "auto", or None for the model's own length.

    `bytes_per_block` counts one block in all layers.
    """

    available_bytes: int
    bytes_per_block: int
    block_size: int
    max_num_seqs: int
    wanted_len: int | str | None
    model_len: int


def size_kv_cache(request: KVRequest) -> KVSize:
    """Divide the memory into blocks.

    Raises: ConfigError if not even one sequence of the wanted length fits, with the length and
    the memory that would do.
    """
    blocks = request.available_bytes // request.bytes_per_block
    fits = max(0, blocks - 1) * request.block_size
    if fits == 0:
        need = describe_bytes(2 * request.bytes_per_block)
        raise ConfigError(
            f"no KV block fits in {describe_bytes(max(0, request.available_bytes))}; two blocks "
            f"of {request.block_size} tokens need {need}. Raise --kv-cache-memory-bytes, or lower "
            "--block-size."
        )
    if request.wanted_len == "auto":
        length = min(request.model_len, fits)
        why = "the model's own" if length == request.model_len else "the largest that fits"
    else:
        length = _checked_length(request, fits)
        why = "the model's own" if request.wanted_len is None else "as asked"
    most = request.max_num_seqs * -(-length // request.block_size) + 1
    return KVSize(num_blocks=min(blocks, most), max_model_len=length, why=why)


def size_without_cache(max_num_seqs: int, longest: int, why: str) -> KVSize:
    """Return the size where no layer keeps anything: a block a sequence, which holds nothing."""
    return KVSize(num_blocks=max_num_seqs + 1, max_model_len=longest, why=why)


def _checked_length(request: KVRequest, fits: int) -> int:
    length = request.model_len if request.wanted_len is None else request.wanted_len
    assert isinstance(length, int), length
    if length <= fits:
        return length
    need = (-(-length // request.block_size) + 1) * request.bytes_per_block
    raise ConfigError(
        f"--max-model-len {length} does not fit: its KV blocks need {describe_bytes(need)}, "
        f"available are {describe_bytes(request.available_bytes)}. Use --max-model-len {fits} "
        f"or auto, or --kv-cache-memory-bytes {need}."
    )
