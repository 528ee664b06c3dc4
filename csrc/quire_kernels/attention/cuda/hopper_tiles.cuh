// How tiles of queries, keys and values come into shared memory on compute capability 9.0.
#pragma once

#include "arguments.h"
#include "hopper.cuh"
#include "query_tile.cuh"

namespace quire {

template <int D>
struct HopperShape {
    static constexpr int ROWS = 128;
    static constexpr int KEYS = D <= 128 ? 128 : 64;
    static constexpr int STAGES = 2;
    // The next tile's queries come while the last products of the current one run.
    static constexpr int Q_STAGES = D <= 128 ? 2 : 1;
    static constexpr int CHUNKS = D / 64;
    // Columns of a product with values, and how many such products make up a row.
    static constexpr int WIDTH = D <= 128 ? D : 128;
    static constexpr int PARTS = D / WIDTH;
    static constexpr int Q_BYTES = ROWS * D * 2;
    static constexpr int TILE_BYTES = KEYS * D * 2;
    // The last 1,024 are for the alignment of the first tile.
    static constexpr int SHARED_BYTES = Q_STAGES * Q_BYTES + 2 * STAGES * TILE_BYTES + 128 + 1024;
    static constexpr int THREADS = 384;
};

struct TileBarriers {
    uint64_t q_full[2], q_empty[2], k_full[2], k_empty[2], v_full[2], v_empty[2];
};

// The tiles of a block, which are sorted by their work: there and back, so that each block gets
// about the same.
struct Turns {
    int round = 0;

    __device__ __forceinline__ int next() {
        const int blocks = gridDim.x, own = blockIdx.x;
        const int place = round & 1 ? blocks - 1 - own : own;
        return blocks * round++ + place;
    }
};

// A slot of a ring of buffers, and the parity of its barriers' phase.
template <int STAGES>
struct Ring {
    int slot = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

template <int D>
struct HopperMemory {
    using Shape = HopperShape<D>;
    uint8_t *q, *k, *v;
    TileBarriers* barriers;

    __device__ __forceinline__ explicit HopperMemory(uint8_t* raw) {
        q = raw + (1024 - (shared_address(raw) & 1023)) % 1024;
        k = q + Shape::Q_STAGES * Shape::Q_BYTES;
        v = k + Shape::STAGES * Shape::TILE_BYTES;
        barriers = reinterpret_cast<TileBarriers*>(v + Shape::STAGES * Shape::TILE_BYTES);
    }

    // By one thread, before all meet.
    __device__ __forceinline__ void init() const {
        constexpr int CONSUMER_WARPS = 8;
        constexpr int COPIERS = 2;
        for (int i = 0; i < Shape::Q_STAGES; ++i) {
            barrier_init(&barriers->q_full[i], 1);
            barrier_init(&barriers->q_empty[i], CONSUMER_WARPS);
        }
        for (int i = 0; i < Shape::STAGES; ++i) {
            barrier_init(&barriers->k_full[i], COPIERS);
            barrier_init(&barriers->v_full[i], COPIERS);
            barrier_init(&barriers->k_empty[i], CONSUMER_WARPS);
            barrier_init(&barriers->v_empty[i], CONSUMER_WARPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fence_async_proxy();
    }
};

// Have tiles of keys or of values copied by COPIERS warps, of which this is number `own`: each lane
// copies the `box` rows of one block, for one warp takes too long for blocks of 16.
template <int D>
struct TileCopier {
    using Shape = HopperShape<D>;
    static constexpr int COPIERS = 2;

    const CUtensorMap* map;
    const Arguments& a;
    uint8_t* memory;
    uint64_t *full, *empty;
    int column, box, own;
    Ring<Shape::STAGES> ring;

    // Where a lane's rows begin in a tile, at or behind its end where it has none.
    __device__ __forceinline__ int first_row() const {
        return (static_cast<int>(threadIdx.x) % 32 * COPIERS + own) * box;
    }

    __device__ __forceinline__ void copy(const QueryTile& tile, int n) {
        const int key = n * Shape::KEYS + first_row();
        const bool is_wanted = first_row() < Shape::KEYS && key < tile.high && key + box > tile.low;
        int block = 0;
        if (is_wanted) block = a.block_table[tile.sequence * a.table_stride + key / a.block_size];
        const int pieces = __popc(__ballot_sync(0xFFFFFFFF, is_wanted));
        barrier_wait(&empty[ring.slot], ring.parity ^ 1);
        if (threadIdx.x % 32 == 0) {
            barrier_expect(&full[ring.slot], pieces * box * 128 * Shape::CHUNKS);
        }
        __syncwarp();
        if (is_wanted) {
            uint8_t* to = memory + ring.slot * Shape::TILE_BYTES + first_row() * 128;
            const int row = tile.kv_head * a.block_size + key % a.block_size;
#pragma unroll
            for (int c = 0; c < Shape::CHUNKS; ++c) {
                copy_tile(to + c * Shape::KEYS * 128, map, &full[ring.slot], column + c * 64, row,
                          block);
            }
        }
        __syncwarp();
        ring.advance();
    }
};

// Have all tiles of a block copied, by four warps: two for keys, two for values.
template <int D>
__device__ __forceinline__ void copy_tiles(const CUtensorMap* q_map, const CUtensorMap* cache_map,
                                           const Arguments& a, const HopperMemory<D>& memory,
                                           int box) {
    using Shape = HopperShape<D>;
    const int warp = threadIdx.x / 32;
    const int group = a.num_heads / a.num_kv_heads;
    TileBarriers* barriers = memory.barriers;
    const bool is_key = warp < 2;
    TileCopier<D> copier{cache_map,
                         a,
                         is_key ? memory.k : memory.v,
                         is_key ? barriers->k_full : barriers->v_full,
                         is_key ? barriers->k_empty : barriers->v_empty,
                         is_key ? 0 : D,
                         box,
                         warp % 2,
                         {}};
    Ring<Shape::Q_STAGES> q_ring;
    Turns turns;
    const int num_turns = a.tiles[0] * a.num_kv_heads;
    for (int index; (index = turns.next()) < num_turns;) {
        const QueryTile tile(a, index, Shape::ROWS, Shape::KEYS);
        if (threadIdx.x == 0) {
            uint64_t* full = &barriers->q_full[q_ring.slot];
            uint8_t* to = memory.q + q_ring.slot * Shape::Q_BYTES;
            barrier_wait(&barriers->q_empty[q_ring.slot], q_ring.parity ^ 1);
            barrier_expect(full, Shape::ROWS / group * group * 128 * Shape::CHUNKS);
            for (int c = 0; c < Shape::CHUNKS; ++c) {
                copy_tile(to + c * Shape::ROWS * 128, q_map, full, c * 64, tile.kv_head * group,
                          tile.token);
            }
            q_ring.advance();
        }
        __syncwarp();
#pragma unroll 1
        for (int n = tile.last; n >= tile.first; --n) copier.copy(tile, n);
    }
}

}  // namespace quire
