// Shared memory of `many_rows`: what lies where, and how rows of x come to it.
#pragma once

#include "../../attention/cuda/hopper.cuh"
#include "ring.cuh"
#include "shares.cuh"

namespace quire {

template <int ROWS, int GROUPS>
struct ManyShape {
    static constexpr int OUTPUTS = 128;
    static constexpr int THREADS = 384;
    static constexpr int CONSUMERS = 256;
    static constexpr int X_BYTES = ROWS * 128;
    using Ring = UnitRing<GROUPS, ROWS <= 128 ? 8 : 5>;
    static constexpr int RING_BYTES = CONSUMERS / 32 * Ring::BYTES;
    // Rows that are turned round in shared memory at a time, and the numbers between two of them, so
    // that banks differ.
    static constexpr int TURNED = ROWS % 64 == 0 && ROWS > 64 ? 64 : ROWS < 32 ? ROWS : 32;
    static constexpr int OUT_STRIDE = OUTPUTS + 8;
    static constexpr int TURNED_BYTES = TURNED * OUT_STRIDE * 2;
    // What there is for a block, which has an SM to itself; the last 1,024 are for the alignment of the
    // first slot.
    static constexpr int MOST = 232448;
    static constexpr int FIT = (MOST - RING_BYTES - TURNED_BYTES - 1280) / X_BYTES;
    static constexpr int SLOTS = FIT < 8 ? FIT : 8;
    static constexpr int SHARED_BYTES = SLOTS * X_BYTES + RING_BYTES + TURNED_BYTES + 1280;
};

template <typename Shape>
struct ManyMemory {
    uint8_t *x, *rings, *turned;
    // Of each slot; and one that nobody waits for.
    uint64_t *full, *empty, *unused;

    __device__ __forceinline__ explicit ManyMemory(uint8_t* raw) {
        x = raw + (1024 - (shared_address(raw) & 1023)) % 1024;
        rings = x + Shape::SLOTS * Shape::X_BYTES;
        turned = rings + Shape::RING_BYTES;
        full = reinterpret_cast<uint64_t*>(turned + Shape::TURNED_BYTES);
        empty = full + Shape::SLOTS;
        unused = empty + Shape::SLOTS;
    }
};

__device__ __forceinline__ void copy_rows(void* to, const CUtensorMap* map, int column, int row,
                                          uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        " [%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
        "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}

// Have the rows of all of a block's tiles copied, by one thread; behind the last input they are zeros.
template <typename Shape, int ROWS>
__device__ __forceinline__ void copy_all(const CUtensorMap* map, const ManyMemory<Shape>& memory,
                                         const PackedArguments& a, Units units, int row) {
    int slot = 0, parity = 1;
#pragma unroll 1
    for (int left = 2 * units.left; left > 0; --left) {
        barrier_wait(&memory.empty[slot], parity);
        barrier_expect(&memory.full[slot], Shape::X_BYTES);
        const int column = units.number * UNIT_IN + (left % 2 == 0 ? 0 : TILE_IN);
        copy_rows(memory.x + slot * Shape::X_BYTES, map, column, row, &memory.full[slot]);
        if (++slot == Shape::SLOTS) slot = 0, parity ^= 1;
        if (left % 2 == 1 && ++units.number * UNIT_IN >= a.in_features) {
            units.number = 0;
            row += ROWS;
            if (row >= a.rows) row = 0;
        }
    }
}

}  // namespace quire
