// What Python and the kernels of all instruction sets share: plain structs, no C++ library.
//
// A KV block holds, head after head, first keys and then values:
//
//     keys    [ceil(head_dim / pair)][block_size] words of 32 bits
//     values  [block_size][value_dim]
//
// A word is one float32, or two neighbouring dimensions of 16 bits (pair = 2; an odd last one has
// a zero beside it). Vector lanes are tokens where scores are made, so that nothing is summed
// across lanes, and dimensions where values are weighed.
#pragma once

#include <stddef.h>
#include <stdint.h>

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Keys between two of these are summed by themselves and merged in order, whoever computes them:
// results do not depend on threads or on the other sequences.
enum { SPLIT = 256, CHUNK = 64, TILE_ROWS = 32, ITEM_SIZE = 8 };

struct Spec {
    int32_t dtype, num_heads, num_kv_heads, head_dim, value_dim, block_size, causal, window;
    float scale, softcap;
    int32_t isa, num_threads;
};

// A KV head's query heads for some tokens of a sequence, over the keys of some splits. `part` is
// -1 where these are all splits, else where the sums go: parts first_part .. + num_parts belong
// together, and whoever finishes last merges them.
struct Item {
    int32_t sequence, kv_head, first_query, num_queries, first_split, end_split, part, first_part;
};

struct Step {
    const int32_t *block_table, *seq_lens, *starts;
    int64_t table_stride, num_items, num_threads, scratch_size, part_size;
    const Item *items;
    const int32_t *num_parts;  // by first part
    int32_t *finished;         // by first part, zero between calls
    float *scratch, *parts;
};

struct AttendCall {
    const void *q;
    const uint8_t *cache;
    void *out;
    float *lse;
    const float *sinks, *alibi_slopes;
    int64_t q_token, q_head, block_bytes;  // strides: of q in elements
};

struct WriteCall {
    const void *q, *k, *v;  // q null: keys and values alone, as they are
    void *q_out;
    uint8_t *cache;
    const int32_t *slots, *positions;
    const float *cos, *sin;
    const void *q_norm, *k_norm;
    int64_t num_tokens, q_token, k_token, k_head, v_token, v_head, block_bytes, rotary_half;
    float eps;
};

// Rows of a norm, an activation or a quantization, contiguous. `residual`, where given, is added
// into x first; `scales` are what a quantization gives beside its values.
struct RowsCall {
    void *x;
    const void *residual, *weight;
    void *out;
    int64_t num_rows, size;
    float eps;
    float *scales;
};

// A product of 8-bit integers: int8.h says how `tiles` lie. `values` [num_rows][inputs] are rounded
// already, around 128, where `x` is null; they and `sums` are changed. `inputs` is a multiple of 4.
struct Int8Call {
    const void *x, *bias;
    void *out;
    const uint8_t *tiles;
    const float *scales;  // of outputs
    uint8_t *values;
    float *x_scales;  // of rows
    int32_t *sums;
    int64_t num_rows, inputs, outputs;
};

// A product with packed weights of 4 or 8 bits in groups, or these made wide: packed.h. Input k is
// x[order[k]], where `order` is given. `wide` is room for the inputs as floats. Strides in
// elements: those of scales and zeros go from group to group and from output to output, or from
// byte to byte.
struct PackedCall {
    const void *x, *bias;
    const int32_t *order;
    void *out;
    const uint8_t *values, *zeros;
    const uint16_t *scales;
    float *wide;
    int64_t num_rows, inputs, outputs, group_size, bits;
    int64_t x_stride, out_stride, value_stride;
    int64_t scale_group, scale_stride, zero_group, zero_stride;
};

struct Kernels {
    const char *name;
    int64_t (*scratch_size)(const Spec *);
    int64_t (*part_size)(const Spec *);
    void (*attend)(const Spec *, const Step *, const AttendCall *, const Item *, float *scratch);
    void (*write)(const Spec *, const WriteCall *, int64_t first, int64_t end);
    void (*norm)(int32_t dtype, const RowsCall *, int64_t first, int64_t end);
    void (*silu_mul)(int32_t dtype, const RowsCall *, int64_t first, int64_t end);
    void (*quantize)(int32_t dtype, const RowsCall *, int64_t first, int64_t end);
    void (*int8_rows)(int32_t dtype, const Int8Call *, int64_t first, int64_t end);
    void (*int8_tiles)(int32_t dtype, const Int8Call *, int64_t first, int64_t end);
    int64_t (*packed_width)(const PackedCall *);
    void (*arrange)(int32_t dtype, const PackedCall *, int64_t first, int64_t end);
    void (*packed)(int32_t dtype, const PackedCall *, int64_t first, int64_t end);
    void (*widen)(int32_t dtype, const PackedCall *, int64_t first, int64_t end);
};

extern "C" {
const Kernels *quire_kernels_plain();
const Kernels *quire_kernels_avx2();
const Kernels *quire_kernels_avx512();
const Kernels *quire_kernels_avx512_bf16();
}
