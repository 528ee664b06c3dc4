// What the entry points take: one struct a call, whose constant part is filled in once.
// The Python side declares the same fields in the same order.
#pragma once

#include <cstdint>

namespace quire {

constexpr int BFLOAT16 = 0;
constexpr int FLOAT16 = 1;

// What a cache holds: numbers of `dtype`, or floats of 8 bits that scales belong to.
constexpr int KV_AS_DTYPE = 0;
constexpr int KV_E4M3 = 1;
constexpr int KV_E5M2 = 2;

// An entry of the split plan: row, first key, key after the last, number of the row's splits.
constexpr int ITEM_SIZE = 4;

struct Arguments {
    // q [num_tokens, num_heads, head_dim], strided in its first two dimensions.
    const void* q;
    // cache [num_blocks, num_kv_heads, block_size, 2 * head_dim]: a key, then its value.
    const void* cache;
    // out [num_tokens, num_heads, head_dim], strided in its first dimension.
    void* out;
    // lse [num_tokens, num_heads] or null; sinks [num_heads] or null.
    float* lse;
    const float* sinks;
    // Scales of keys and values of a quantized cache [num_kv_heads], else null.
    const float* k_scale;
    const float* v_scale;
    const int32_t* block_table;
    const int32_t* seq_lens;
    // Where each sequence's tokens begin, [num_seqs + 1].
    const int32_t* starts;
    // Split plan of those of the first `num_rows` sequences that have one token: items
    // [max_items, ITEM_SIZE]; the first item of each row, and behind them the number of items,
    // [num_rows + 1]; how many blocks of a row have stored their sums [num_rows, num_heads].
    int32_t* items;
    int32_t* first_items;
    int32_t* arrived;
    // Sums of splits: [max_items, num_heads, head_dim] and [max_items, num_heads].
    float* partial;
    float* partial_lse;
    // The number of tiles of the sequences with several tokens, and another number; then
    // (sequence, first token) of each. A launch is for `most_tiles`.
    const int32_t* tiles;
    // Blocks of a quantized cache that are made wide, and where: see widen.cu.
    void* wide;
    const int32_t* wide_blocks;
    int32_t* wide_table;
    // Strides in elements.
    int64_t q_stride_token;
    int64_t q_stride_head;
    int64_t out_stride;
    int64_t block_stride;
    int64_t table_stride;
    int64_t wide_stride;
    int64_t num_tokens;
    int64_t num_blocks;
    int32_t num_heads;
    int32_t num_kv_heads;
    int32_t head_dim;
    int32_t block_size;
    // Latest tokens that a token sees; 0: all of them.
    int32_t window;
    int32_t dtype;
    int32_t kv_dtype;
    // Rows of the split plan, and the most items of a launch.
    int32_t num_rows;
    int32_t max_items;
    // How the plan cuts: see `plan_splits`.
    int32_t few_extra;
    int32_t few_chunk;
    int32_t num_extra;
    int32_t chunk;
    int32_t most_tiles;
    int32_t most_wide;
    int32_t num_sms;
    float scale;
    // 0: none.
    float softcap;
};

}  // namespace quire
