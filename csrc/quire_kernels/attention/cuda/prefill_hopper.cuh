// Attention of sequences with several tokens on compute capability 9.0a.
//
// A block of 3 warpgroups works on one tile after another: 128 rows, each a (token, head) pair of
// one KV head, heads fastest. Warpgroup 0 has tiles of queries, keys and values copied; 1 and 2
// own 64 rows each. The product with the next keys and the one with the current values run beside
// the exponentials of the next scores (FlashAttention-3, section 3.2). That paper also has the
// two warpgroups take turns; here they fall into turns of themselves: one H200, 8,192 tokens of
// 32/8 heads of 128, 636 TFLOP/s with barriers that force them and 641 without.
#pragma once

#include "hopper_tiles.cuh"

namespace quire {

// The 64 rows of a warpgroup: a thread has two of them, 8 apart, and in each two columns of 8.
template <typename T, int D, bool CAPPED>
struct Consumer {
    using Shape = HopperShape<D>;
    static constexpr int KEYS = Shape::KEYS;

    const Arguments& a;
    const HopperMemory<D>& memory;
    const Scale scale;
    const int warpgroup, lane, row;
    float out[Shape::PARTS][Shape::WIDTH / 2];
    float scores[KEYS / 2];
    uint32_t weights[KEYS / 4];
    float peak[2], total[2], shrink[2];
    int positions[2];
    Ring<Shape::STAGES> k_ring, v_ring;
    Ring<Shape::Q_STAGES> q_ring;

    __device__ __forceinline__ Consumer(const Arguments& a, const HopperMemory<D>& memory)
        : a(a),
          memory(memory),
          scale(a.scale, a.softcap),
          warpgroup(threadIdx.x / 128 - 1),
          lane(threadIdx.x % 32),
          row(warpgroup * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4) {}

    __device__ __forceinline__ void begin(const QueryTile& tile) {
        const int group = a.num_heads / a.num_kv_heads;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            peak[h] = LOWEST;
            total[h] = 0.0f;
            positions[h] = tile.position + (row + 8 * h) / group;
        }
    }

    // Start scores = queries * keys of the next tile of keys, which has arrived.
    __device__ __forceinline__ void multiply_keys() {
        const uint64_t q = matrix_at(
            memory.q + q_ring.slot * Shape::Q_BYTES + warpgroup * 64 * 128, 16, 1024);
        const uint64_t k = matrix_at(memory.k + k_ring.slot * Shape::TILE_BYTES, 16, 1024);
        pin(scores);
        products_fence();
#pragma unroll
        for (int c = 0; c < Shape::CHUNKS; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                Product<T, KEYS>::shared(scores, q + (c * Shape::ROWS * 128 + i * 32) / 16,
                                         k + (c * KEYS * 128 + i * 32) / 16, c + i > 0);
            }
        }
        products_commit();
    }

    // Start out += weights * values of the next tile of values, which has arrived.
    __device__ __forceinline__ void multiply_values(bool keep) {
        const uint8_t* values = memory.v + v_ring.slot * Shape::TILE_BYTES;
        const uint64_t v = matrix_at(values, KEYS * 128, 1024);
#pragma unroll
        for (int p = 0; p < Shape::PARTS; ++p) pin(out[p]);
        products_fence();
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i) {
#pragma unroll
            for (int p = 0; p < Shape::PARTS; ++p) {
                const int offset = p * (Shape::WIDTH / 64) * KEYS * 128 + i * 16 * 128;
                Product<T, Shape::WIDTH>::registers(out[p], weights + 4 * i, v + offset / 16,
                                                    keep || i > 0);
            }
        }
        products_commit();
    }

    __device__ __forceinline__ void release(uint64_t* empty) {
        if (lane == 0) barrier_arrive(empty);
    }

    __device__ __forceinline__ void release_keys() {
        release(&memory.barriers->k_empty[k_ring.slot]);
        k_ring.advance();
    }

    __device__ __forceinline__ void release_values() {
        release(&memory.barriers->v_empty[v_ring.slot]);
        v_ring.advance();
    }

    // Zero the values that no row sees: what lies there times a weight of zero may be a NaN. Both
    // warpgroups write them, so that neither waits for the other.
    __device__ __forceinline__ void clear_hidden_values(const QueryTile& tile, int n) {
        uint8_t* values = memory.v + v_ring.slot * Shape::TILE_BYTES;
        const int i = threadIdx.x % 128;
        const int key = n * KEYS + i;
        if (i < KEYS && (key < tile.low || key >= tile.high)) {
#pragma unroll
            for (int c = 0; c < Shape::CHUNKS; ++c) {
                uint4* place = reinterpret_cast<uint4*>(values + c * KEYS * 128 + i * 128);
#pragma unroll
                for (int j = 0; j < 8; ++j) place[j] = make_uint4(0, 0, 0, 0);
            }
        }
        fence_async_proxy();
        warpgroup_sync(1 + warpgroup);
    }

    __device__ __forceinline__ void hide(int n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            // Columns of the tile that the row sees: [from, to].
            const int own = n * KEYS + 2 * (lane & 3);
            const int to = positions[h] - own;
            const int from = a.window ? to - a.window + 1 : -KEYS;
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int column = 8 * i + e;
                    float& score = scores[4 * i + 2 * h + e];
                    score = column <= to && column >= from ? score : -INFINITY;
                }
            }
        }
    }

    // Turn scores into weights that are not yet rounded; `shrink` is for what was summed before.
    __device__ __forceinline__ void weigh() {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float most = peak[h];
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i) {
                most = fmaxf(most, fmaxf(scores[4 * i + 2 * h], scores[4 * i + 2 * h + 1]));
            }
            most = largest_of_quad(most);
            shrink[h] = power_of_two((peak[h] - most) * scale.factor);
            peak[h] = most;
            const float base = most * scale.factor;
            float sum = total[h] * shrink[h];
#pragma unroll
            for (int i = 0; i < KEYS / 8; ++i) {
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    float& score = scores[4 * i + 2 * h + e];
                    score = power_of_two(fmaf(score, scale.factor, -base));
                    sum += score;
                }
            }
            total[h] = sum;
        }
    }

    __device__ __forceinline__ void soften(const QueryTile& tile, int n) {
        if constexpr (CAPPED) {
#pragma unroll
            for (int i = 0; i < KEYS / 2; ++i) {
                scores[i] = hyperbolic_tangent(scores[i] * scale.inner);
            }
        }
        if (tile.hides(n, KEYS, a.window)) hide(n);
        weigh();
    }

    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int i = 0; i < KEYS / 4; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
    }

    // Peaks rarely move once a row has seen many keys.
    __device__ __forceinline__ void shrink_out() {
        if (!__any_sync(0xFFFFFFFF, shrink[0] != 1.0f || shrink[1] != 1.0f)) return;
#pragma unroll
        for (int p = 0; p < Shape::PARTS; ++p) {
#pragma unroll
            for (int i = 0; i < Shape::WIDTH / 2; ++i) out[p][i] *= shrink[i / 2 % 2];
        }
    }

    __device__ __forceinline__ void await_values(const QueryTile& tile, int n) {
        barrier_wait(&memory.barriers->v_full[v_ring.slot], v_ring.parity);
        if (tile.is_edge(n, KEYS)) clear_hidden_values(tile, n);
    }

    __device__ __forceinline__ void attend(const QueryTile& tile) {
        TileBarriers* barriers = memory.barriers;
        begin(tile);
        barrier_wait(&barriers->q_full[q_ring.slot], q_ring.parity);
        barrier_wait(&barriers->k_full[k_ring.slot], k_ring.parity);
        multiply_keys();
        products_wait<0>();
        pin(scores);
        release_keys();
        soften(tile, tile.last);
        round_weights();
        int n = tile.last;
        for (; n > tile.first; --n) {
            barrier_wait(&barriers->k_full[k_ring.slot], k_ring.parity);
            multiply_keys();
            await_values(tile, n);
            multiply_values(n < tile.last);
            products_wait<1>();
            pin(scores);
            release_keys();
            soften(tile, n - 1);
            compute_before_here(total[0] + total[1]);
            products_wait<0>();
#pragma unroll
            for (int p = 0; p < Shape::PARTS; ++p) pin(out[p]);
            release_values();
            shrink_out();
            round_weights();
        }
        release(&barriers->q_empty[q_ring.slot]);
        q_ring.advance();
        await_values(tile, n);
        multiply_values(n < tile.last);
        products_wait<0>();
#pragma unroll
        for (int p = 0; p < Shape::PARTS; ++p) pin(out[p]);
        release_values();
    }

    // Divide by the sums, of which a sink is a part that no value belongs to, and store.
    __device__ __forceinline__ void store(const QueryTile& tile) {
        const int group = a.num_heads / a.num_kv_heads;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int own = row + 8 * h;
            const bool is_row = own < tile.num_tokens * group;
            const int64_t token = tile.token + own / group;
            const int head = tile.kv_head * group + own % group;
            const RowEnd end(a, sum_of_quad(total[h]), peak[h] * scale.factor, head, is_row);
            if (a.lse && is_row && (lane & 3) == 0) a.lse[token * a.num_heads + head] = end.lse;
            T* place = static_cast<T*>(a.out) + token * a.out_stride + head * D + 8 * (lane & 3);
#pragma unroll
            for (int c = 0; c < D / 32; ++c) {
                const float* sums = out[c * 32 / Shape::WIDTH] + c * 32 % Shape::WIDTH / 2 + 2 * h;
                uint32_t words[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    words[i] = pack<T>(sums[4 * i] * end.inverse, sums[4 * i + 1] * end.inverse);
                }
                const uint4 piece = transposed_in_quad(words, lane);
                if (is_row) *reinterpret_cast<uint4*>(place + 32 * c) = piece;
            }
        }
    }
};

template <typename T, int D, bool CAPPED>
__global__ void __launch_bounds__(384, 1)
    attend_hopper(const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap cache_map,
                  const __grid_constant__ Arguments a, int box) {
    using Shape = HopperShape<D>;
    extern __shared__ uint8_t raw[];
    const HopperMemory<D> memory(raw);
    if (threadIdx.x == 0) memory.init();
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<40>();
        copy_tiles<D>(&q_map, &cache_map, a, memory, box);
    } else {
        take_registers<232>();
        Consumer<T, D, CAPPED> consumer(a, memory);
        Turns turns;
        const int num_turns = a.tiles[0] * a.num_kv_heads;
        for (int index; (index = turns.next()) < num_turns;) {
            const QueryTile tile(a, index, Shape::ROWS, Shape::KEYS);
            consumer.attend(tile);
            consumer.store(tile);
        }
    }
}

}  // namespace quire
