"""The kernels: `attend` for any batch, `merge` of split sequences, `plan_splits` once a step.

Rows of a product are (token, query head) pairs that share a KV head, so that tensor cores have
work at one token. Exponents are powers of two: log2(e) is folded into the scale of the scores.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quire_kernels import costs
from quire_kernels.hyperbolic import tanh
from quire_kernels.overlap import let_next_begin, wait_for_previous
from quire_kernels.rounding import INTERPRETED, narrowed, rounded, widened

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Where a row's largest score starts. Finite, so that a row which has seen no key yet gives
# 2 ** (-inf - LOWEST) = 0 and never the NaN of inf - inf.
LOWEST = tl.constexpr(-1.0e30)
# An entry of the split plan: row, first key, key after the last, number of the row's splits, and
# where the item's partial result lies; padded to what one wide read takes.
ITEM_SIZE = tl.constexpr(8)


@triton.jit
def product(a, b, acc, INVARIANT: tl.constexpr):
    """Return acc + a @ b with float32 sums; float32 factors are multiplied in IEEE arithmetic."""
    # The interpreter multiplies the bits of bfloat16 as integers.
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    # NumPy's products, unlike a GPU's, differ with a row's place.
    if INTERPRETED and INVARIANT:
        acc += tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def blocks_of(table, first, columns, high, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the blocks of BLOCK_N keys from `first`, a multiple of BLOCK_N; 0 from `high` on.

    A tile is a part of one block, or several whole ones:

        BLOCK_SIZE >= BLOCK_N   [ . . tile . ]              one table entry
        BLOCK_SIZE <  BLOCK_N   [ b ][ b ][ b ][ b ]        an entry a key, equal within a block
    """
    if BLOCK_SIZE >= BLOCK_N:
        blocks = tl.load(table + first // BLOCK_SIZE, mask=first < high, other=0)
    else:
        entries = table + first // BLOCK_SIZE + columns // BLOCK_SIZE
        blocks = tl.load(entries, mask=first + columns < high, other=0)
    return blocks


@triton.jit
def offsets_in(
    blocks, first, columns, stride_block,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return where the keys of a tile with these blocks lie in the cache, in 64 bits."""
    starts = blocks.to(tl.int64) * stride_block
    if BLOCK_SIZE >= BLOCK_N:
        offsets = starts + (first % BLOCK_SIZE + columns) * WIDTH
    else:
        offsets = starts + (columns % BLOCK_SIZE) * WIDTH
    return offsets


@triton.jit
def over_keys(
    acc, peak, total, q, positions, table, cache, row_scale, slopes, stride_block, begin, end, low,
    high, SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    MASKED: tl.constexpr, INVARIANT: tl.constexpr,
):  # fmt: skip
    """Take the tiles of keys in [begin, end) into the running softmax.

    `acc` [BLOCK_M, BLOCK_V], `peak` (largest score, times log2 e) and `total` [BLOCK_M].
    `cache` points at the head's first token. `row_scale` [BLOCK_M], or None, multiplies scores;
    `slopes` [BLOCK_M], or None, times a key's distance is taken from them once they are scaled.
    MASKED: keys outside [low, high) are not read, and each row sees what its position and WINDOW
    allow; else all rows see all keys of the tiles.
    """
    columns = tl.arange(0, BLOCK_N)
    dims, value_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    # Block ids are read a tile ahead, so that no copy into shared memory waits for them: read in
    # the same pass, they take a stage of the compiler's pipeline away from keys and values.
    blocks = blocks_of(table, begin, columns, high, BLOCK_SIZE, BLOCK_N)
    for first in range(begin, end, BLOCK_N):
        keys = first + columns
        inside = (keys >= low) & (keys < high)
        offsets = offsets_in(
            blocks, first, columns, stride_block, BLOCK_SIZE, BLOCK_N, HEAD_DIM + VALUE_DIM
        )
        blocks = blocks_of(table, first + BLOCK_N, columns, high, BLOCK_SIZE, BLOCK_N)
        k_pointers = cache + offsets[:, None] + dims[None, :]
        v_pointers = cache + offsets[:, None] + (HEAD_DIM + value_dims)[None, :]
        if MASKED:
            k = tl.load(k_pointers, mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        elif BLOCK_D != HEAD_DIM:
            k = tl.load(k_pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_pointers)
        k = widened(k, q.dtype)
        scores = tl.zeros([q.shape[0], BLOCK_N], dtype=tl.float32)
        scores = product(q, tl.trans(k), scores, INVARIANT)
        if row_scale is not None:
            scores *= row_scale[:, None]
        # 2 ** (scores * factor) is the exponential of a score.
        factor: tl.constexpr = (SCALE if SOFTCAP is None else SOFTCAP) * LOG2_E
        if SOFTCAP is not None:
            scores = tanh(scores * (SCALE / SOFTCAP))
        power: tl.constexpr = factor if slopes is None else LOG2_E
        if slopes is not None:
            distance = (positions[:, None] - keys[None, :]).to(tl.float32)
            scores = scores * (factor / LOG2_E) - slopes[:, None] * distance
        if MASKED:
            visible = (keys[None, :] <= positions[:, None]) & inside[None, :]
            if WINDOW is not None:
                visible &= keys[None, :] > positions[:, None] - WINDOW
            scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * power)
        weights = tl.exp2(scores * power - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        if MASKED:
            v_mask = inside[:, None] & (value_dims < VALUE_DIM)[None, :]
            v = tl.load(v_pointers, mask=v_mask, other=0.0)
        elif BLOCK_V != VALUE_DIM:
            v = tl.load(v_pointers, mask=(value_dims < VALUE_DIM)[None, :], other=0.0)
        else:
            v = tl.load(v_pointers)
        acc = product(rounded(weights, q.dtype), widened(v, q.dtype), acc, INVARIANT)
        peak = new_peak
    return acc, peak, total


@triton.jit(
    do_not_specialize=["table_stride"],
    do_not_specialize_on_alignment=["table_ptr", "seq_lens_ptr", "starts_ptr", "items_ptr"],
    launch_metadata=costs.of_attention,
)
def attend(
    q_ptr, cache_ptr, out_ptr, lse_ptr, sinks_ptr, k_scale_ptr, v_scale_ptr, table_ptr,
    seq_lens_ptr, starts_ptr, items_ptr, num_items_ptr, partial_ptr, partial_lse_ptr,
    q_stride, q_stride_head, out_stride, stride_block, table_stride,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SINGLE: tl.constexpr, INVARIANT: tl.constexpr,
    OVERLAPS: tl.constexpr, slopes_ptr=None,
):  # fmt: skip
    """Attend BLOCK_M (token, head) rows of one KV head to a range of its sequence's keys.

    Grid (num_kv_heads, items or more). SINGLE: an item is a split of a sequence with one token,
    from `plan_splits`; else (sequence, first token) of a tile, all of whose keys are seen here, and
    their number comes before the first.

    The keys of a tile whose tokens have positions [position, high), where low is the first that
    a row sees; "|" are tile borders, and plain tiles have no masks:

        low                  seen by all rows             position          high
         |... masked (window) |   plain ...  |  masked (diagonal, tail) ...|

    INVARIANT: all tiles are masked, as for one token, so that each row goes the same way.
    """
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    kv_head, item = tl.program_id(0), tl.program_id(1)
    if SINGLE:
        if item >= tl.load(num_items_ptr):
            return
        entry = items_ptr + item * ITEM_SIZE
        sequence = tl.load(entry)
        begin, high = tl.load(entry + 1), tl.load(entry + 2)
        num_splits, place = tl.load(entry + 3), tl.load(entry + 4)
        token, num_tokens = sequence, 1
        position = tl.load(seq_lens_ptr + sequence) - 1
    else:
        if item >= tl.load(items_ptr):
            return
        entry = items_ptr + 2 * (1 + item)
        sequence, skipped = tl.load(entry), tl.load(entry + 1)
        start = tl.load(starts_ptr + sequence)
        query_len = tl.load(starts_ptr + sequence + 1) - start
        num_tokens = tl.minimum(query_len - skipped, BLOCK_M // GROUP)
        token = start + skipped
        position = tl.load(seq_lens_ptr + sequence) - query_len + skipped
        high = position + num_tokens
        begin, num_splits, place = 0, 1, 0
    low = 0
    if WINDOW is not None:
        low = tl.maximum(position - WINDOW + 1, 0)
        if not SINGLE:
            begin = low // BLOCK_N * BLOCK_N

    rows = tl.arange(0, BLOCK_M)
    row_tokens = (token + rows // GROUP).to(tl.int64)
    heads = kv_head * GROUP + rows % GROUP
    is_row = rows < num_tokens * GROUP
    positions = position + rows // GROUP
    dims = tl.arange(0, BLOCK_D)
    q_offsets = row_tokens * q_stride + heads * q_stride_head
    q_mask = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], mask=q_mask, other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    peak = tl.full([BLOCK_M], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if sinks_ptr is not None:
        # One more score, which no value belongs to; the first split has it.
        has_sink = is_row & (begin + 0 * rows <= low)
        sinks = tl.load(sinks_ptr + heads, mask=has_sink, other=float("-inf"))
        peak = tl.maximum(sinks * LOG2_E, LOWEST)
        total = has_sink.to(tl.float32)

    table = table_ptr + sequence.to(tl.int64) * table_stride
    cache = cache_ptr + kv_head * (BLOCK_SIZE * (HEAD_DIM + VALUE_DIM))
    row_scale = None
    if k_scale_ptr is not None:
        q, row_scale = narrowed(q)
        row_scale *= tl.load(k_scale_ptr + kv_head)
    slopes = None
    if slopes_ptr is not None:
        slopes = tl.load(slopes_ptr + heads)
    plain_to = begin
    if not SINGLE and not INVARIANT:
        plain_from = begin
        if WINDOW is not None:
            # The last row sees from `high - WINDOW` on; tiles that begin there or later are plain.
            edge = tl.cdiv(tl.maximum(high - WINDOW, 0), BLOCK_N) * BLOCK_N
            plain_from = tl.minimum(edge, tl.cdiv(high, BLOCK_N) * BLOCK_N)
            acc, peak, total = over_keys(
                acc, peak, total, q, positions, table, cache, row_scale, slopes, stride_block,
                begin, plain_from, low, high, SCALE, SOFTCAP, WINDOW, BLOCK_SIZE, HEAD_DIM,
                VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, MASKED=True, INVARIANT=False,
            )  # fmt: skip
        plain_to = tl.maximum((position + 1) // BLOCK_N * BLOCK_N, plain_from)
        acc, peak, total = over_keys(
            acc, peak, total, q, positions, table, cache, row_scale, slopes, stride_block,
            plain_from, plain_to, low, high, SCALE, SOFTCAP, WINDOW, BLOCK_SIZE, HEAD_DIM,
            VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V, MASKED=False, INVARIANT=False,
        )  # fmt: skip
    # One token is bound by memory, where masks are free: all its tiles in one loop, for the
    # pipeline of copies starts anew in each loop.
    acc, peak, total = over_keys(
        acc, peak, total, q, positions, table, cache, row_scale, slopes, stride_block, plain_to,
        high, low, high, SCALE, SOFTCAP, WINDOW, BLOCK_SIZE, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D,
        BLOCK_V, MASKED=True, INVARIANT=INVARIANT,
    )  # fmt: skip

    # A padding row has seen nothing, and is zero.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    if v_scale_ptr is not None:
        acc *= tl.load(v_scale_ptr + kv_head)
    lse = peak + tl.log2(total)
    value_dims = tl.arange(0, BLOCK_V)
    out_mask = is_row[:, None] & (value_dims < VALUE_DIM)[None, :]
    if num_splits > 1:
        places = place * NUM_HEADS + heads
        part = partial_ptr + places[:, None] * VALUE_DIM + value_dims[None, :]
        tl.store(part, acc, mask=out_mask)
        tl.store(partial_lse_ptr + places, lse, mask=is_row)
        return
    out_offsets = row_tokens * out_stride + heads * VALUE_DIM
    out = out_ptr + out_offsets[:, None] + value_dims[None, :]
    tl.store(out, rounded(acc, out_ptr.dtype.element_ty), mask=out_mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + row_tokens * NUM_HEADS + heads, lse * LN_2, mask=is_row)


@triton.jit(launch_metadata=costs.of_merge)
def merge(
    partial_ptr, partial_lse_ptr, first_items_ptr, out_ptr, lse_ptr, out_stride,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Weigh the splits of a sequence by their sums: grid (NUM_HEADS / HEADS, rows, parts of V).

    Rows with one split were written by `attend` itself.
    """
    let_next_begin(OVERLAPS)
    wait_for_previous(OVERLAPS)
    first_head, row = tl.program_id(0) * HEADS, tl.program_id(1)
    first, last = tl.load(first_items_ptr + row), tl.load(first_items_ptr + row + 1)
    if last - first <= 1:
        return
    dims = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    for head in range(first_head, first_head + HEADS):
        acc = tl.zeros([BLOCK_V], dtype=tl.float32)
        peak, total = tl.full([1], LOWEST, dtype=tl.float32), tl.zeros([1], dtype=tl.float32)
        for begin in range(first, last, BLOCK_S):
            items = begin + tl.arange(0, BLOCK_S)
            places = items * NUM_HEADS + head
            inside = items < last
            lse = tl.load(partial_lse_ptr + places, mask=inside, other=float("-inf"))
            mask = inside[:, None] & (dims < VALUE_DIM)[None, :]
            parts = partial_ptr + places[:, None] * VALUE_DIM + dims[None, :]
            part = tl.load(parts, mask=mask, other=0.0)
            new_peak = tl.maximum(peak, tl.max(lse, 0, keep_dims=True))
            weights = tl.exp2(lse - new_peak)
            shrink = tl.exp2(peak - new_peak)
            acc = acc * shrink + tl.sum(part * weights[:, None], 0)
            total = total * shrink + tl.sum(weights, 0, keep_dims=True)
            peak = new_peak
        out = out_ptr + row.to(tl.int64) * out_stride + head * VALUE_DIM + dims
        tl.store(out, rounded(acc / total, out_ptr.dtype.element_ty), mask=dims < VALUE_DIM)
        if lse_ptr is not None:
            at = lse_ptr + row * NUM_HEADS + head + tl.arange(0, 1)
            tl.store(at, (peak + tl.log2(total)) * LN_2)


@triton.jit
def first_key(seq_len, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return where the tile of the first key lies that a sequence's last token sees."""
    first = seq_len * 0
    if WINDOW is not None:
        first = tl.maximum(seq_len - WINDOW, 0) // BLOCK_N * BLOCK_N
    return first


@triton.jit
def pieces(length, chunk, BLOCK_N: tl.constexpr):
    """Return into how many items of at most about `chunk` keys a row is cut, and their keys.

    Equal pieces instead of whole chunks and a rest; rounded to tiles, they may be fewer.
    """
    num_splits = tl.maximum(tl.cdiv(length, chunk), 1)
    keys = tl.maximum(tl.cdiv(tl.cdiv(length, num_splits), BLOCK_N) * BLOCK_N, BLOCK_N)
    return tl.maximum(tl.cdiv(length, keys), 1), keys


@triton.jit(
    do_not_specialize=["num_rows", "few_extra", "num_extra"],
    do_not_specialize_on_alignment=["seq_lens_ptr", "starts_ptr"],
)
def plan_splits(
    seq_lens_ptr, starts_ptr, items_ptr, first_items_ptr, num_items_ptr,
    num_rows, few_extra, num_extra,
    FEW_CHUNK: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Cut the visible keys of sequences with one token into items of about equal size.

    With chunks of at least total / extra keys no more than num_rows + extra items come out, since
    only a row's last item is shorter. `few_extra` fills the GPU once, if need be by items of
    FEW_CHUNK; `num_extra` evens its load out, by items of CHUNK or more. An empty row has one item
    without keys, which writes its zeros; a row that has not one token has none. SORTED: the largest
    items come first, so that what the GPU waits for at the end is small; partial results lie in the
    order of the rows all the same.
    """
    row = tl.arange(0, ROWS)
    is_row = row < num_rows
    start = tl.load(starts_ptr + row, mask=is_row, other=0)
    is_single = is_row & (tl.load(starts_ptr + row + 1, mask=is_row, other=0) == start + 1)
    seq_len = tl.load(seq_lens_ptr + row, mask=is_single, other=0)
    first = first_key(seq_len, WINDOW, BLOCK_N)
    length = seq_len - first
    total = tl.sum(length, 0)
    few_chunk = tl.maximum(tl.cdiv(total, few_extra), FEW_CHUNK)
    chunk = tl.minimum(few_chunk, tl.maximum(tl.cdiv(total, num_extra), CHUNK))
    num_splits, keys = pieces(length, chunk, BLOCK_N)
    num_splits = tl.where(is_single, num_splits, 0)
    first_item = tl.cumsum(num_splits, 0) - num_splits
    tl.store(first_items_ptr + row, first_item, mask=is_row)
    tl.store(first_items_ptr + num_rows, tl.sum(num_splits, 0))
    tl.store(num_items_ptr, tl.sum(num_splits, 0))
    place = first_item
    if SORTED:
        # Sizes and rows in one number each: the larger first, among equals the later row.
        key = tl.where(is_single, tl.minimum(keys, length).to(tl.int64) * ROWS + row, -1)
        key = tl.sort(key, descending=True)
        is_row = key >= 0
        row = tl.where(is_row, key % ROWS, 0).to(tl.int32)
        tl.debug_barrier()  # the places are read by other threads than wrote them
        place = tl.load(first_items_ptr + row)
        seq_len = tl.load(seq_lens_ptr + row, mask=is_row, other=0)
        first = first_key(seq_len, WINDOW, BLOCK_N)
        num_splits, keys = pieces(seq_len - first, chunk, BLOCK_N)
        num_splits = tl.where(is_row, num_splits, 0)
        first_item = tl.cumsum(num_splits, 0) - num_splits
    for split in range(0, tl.max(num_splits, 0)):
        entry = items_ptr + (first_item + split) * ITEM_SIZE
        begin = first + split * keys
        mask = split < num_splits
        tl.store(entry, row, mask=mask)
        tl.store(entry + 1, begin, mask=mask)
        tl.store(entry + 2, tl.minimum(begin + keys, seq_len), mask=mask)
        tl.store(entry + 3, num_splits, mask=mask)
        tl.store(entry + 4, place + split, mask=mask)
