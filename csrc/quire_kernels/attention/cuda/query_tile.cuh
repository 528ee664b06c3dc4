// A tile of queries of one sequence, and how its rows end.
#pragma once

#include "arguments.h"
#include "numbers.cuh"

namespace quire {

// One tile of queries: `num_tokens` from `token` on, the first at `position` of its sequence, see
// keys in [low, high): tiles of keys from `first` to `last`.
struct QueryTile {
    int sequence, kv_head, token, num_tokens, position, low, high, first, last;

    __device__ __forceinline__ QueryTile(const Arguments& a, int index, int rows, int keys) {
        const int tile = index / a.num_kv_heads;
        kv_head = index - tile * a.num_kv_heads;
        sequence = a.tiles[2 + 2 * tile];
        const int skipped = a.tiles[3 + 2 * tile];
        const int start = a.starts[sequence];
        const int query_len = a.starts[sequence + 1] - start;
        num_tokens = min(query_len - skipped, rows / (a.num_heads / a.num_kv_heads));
        token = start + skipped;
        position = a.seq_lens[sequence] - query_len + skipped;
        high = position + num_tokens;
        low = a.window ? max(position - a.window + 1, 0) : 0;
        first = low / keys;
        last = (high - 1) / keys;
    }

    // Whether some row must not see some key of a tile of keys.
    __device__ __forceinline__ bool hides(int n, int keys, int window) const {
        return (n + 1) * keys > position + 1 || (window && n * keys <= high - 1 - window);
    }

    // Whether a tile of keys has slots that no row sees, whose memory may hold anything.
    __device__ __forceinline__ bool is_edge(int n, int keys) const {
        return (n + 1) * keys > high || n * keys < low;
    }
};

// A row's log-sum-exp, and what its sum of values is multiplied by.
struct RowEnd {
    float lse, inverse;

    // `sum` of exponentials relative to 2 ** `base`; a sink is a part of it that no value has.
    __device__ __forceinline__ RowEnd(const Arguments& a, float sum, float base, int head,
                                      bool is_row) {
        float rest = 1.0f;
        if (a.sinks && is_row) {
            const float sink = a.sinks[head] * LOG2_E;
            const float most = fmaxf(base, sink);
            rest = power_of_two(base - most);
            sum = sum * rest + power_of_two(sink - most);
            base = most;
        }
        inverse = rest / sum;
        lse = (base + log2f(sum)) * LN_2;
    }
};

}  // namespace quire
