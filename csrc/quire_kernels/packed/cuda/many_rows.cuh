// Products of more than a few rows on compute capability 9.0a.
//
// A block of 3 warpgroups makes tiles of 128 outputs and ROWS rows, the first and the last of them from
// some of the inputs: see shares.cuh. The first warpgroup has rows of x copied into a ring in shared memory,
// 64 inputs at a time, from tile to tile without a pause. The other two own 64 outputs each, the rows of
// their products: a warp has its codes copied, 128 inputs at a time, and makes factors of them in
// registers, 64 at a time, while the products with those before run; x is the other factor as it lies in
// shared memory. Having codes copied for all, ten copies of 512 bytes or less a step, took 0.7 us a step.
//
// Gated, a block makes 64 outputs of each part: the first warpgroup silu's argument, the second what
// it is multiplied with.
#pragma once

#include "many_rows_memory.cuh"
#include "register_products.cuh"

namespace quire {

template <typename T, int ROWS, int GROUPS>
struct ManyConsumer {
    using Shape = ManyShape<ROWS, GROUPS>;
    using Ring = typename Shape::Ring;
    using N = Number<T>;
    static constexpr int AHEAD = Ring::AHEAD;
    const PackedArguments& a;
    const Shares& shares;
    const ManyMemory<Shape>& memory;
    const int thread, tile, lane;
    Ring ring;
    float sums[ROWS / 2];
    int slot = 0, parity = 0;
    // The slot of x that the products on their way read.
    uint64_t* before;
    // The scales and zero points of the outputs lane / 4 and lane / 4 + 8 in the group that is next.
    PairScale<T> scales[2];
    uint32_t offsets[2];
    // Which unit is asked for next: its number in its tile, and how many are left with it.
    int number, left;
    // What is written: where it begins, and which eights of rows.
    ManyPlace place;
    int first_eight, end_eight;

    // The first tiles are on their way while the kernel before ends.
    __device__ __forceinline__ ManyConsumer(const PackedArguments& a, const Shares& shares,
                                            const ManyMemory<Shape>& memory, const Units& units)
        : a(a),
          shares(shares),
          memory(memory),
          thread(threadIdx.x - 128),
          tile(thread / 32),
          lane(thread % 32),
          ring(a, memory.rings + tile * Ring::BYTES, lane),
          before(memory.unused),
          number(units.number),
          left(units.left) {
        go_to_codes();
#pragma unroll 1
        for (int i = 0; i < AHEAD; ++i) fetch();
    }

    // Of the next tile. Numbers that few need are found again: registers are few.
    __device__ __forceinline__ void go_to_codes() {
        const int which = (shares.first_of(blockIdx.x + 1) - left) / shares.units_of_tile;
        const ManyPlace next(a, shares, which, ROWS);
        // Where a warp has no outputs it makes others that nobody writes.
        ring.go_to(a, next.has(a, tile) ? next.first_of(a, tile) / TILE_OUT : 0);
    }

    __device__ __forceinline__ void fetch() {
        ring.fetch(number, left > 0);
        --left;
        if (++number == shares.units_of_tile) {
            number = 0;
            go_to_codes();
        }
    }

    // Have the next unit's codes ready, and ask for another's.
    __device__ __forceinline__ void take() {
        ring.wait();
        fetch();
        // The slot that is filled next is the oldest one's.
        ring.head = ring.tail;
    }

    template <bool IS_SHORT>
    __device__ __forceinline__ void read_group(int group) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            scales[i] = PairScale<T>::template of<IS_SHORT>(ring.scale(group, i));
            offsets[i] = ring.template offset<T>(group, i);
        }
    }

    // Make the 4 factors of each of 4 products of the codes of half a unit: the first of the next one, or
    // the second of that.
    template <bool IS_SHORT>
    __device__ __forceinline__ void widen(int half, uint32_t (&factors)[16]) {
        if (half == 0) take();
        const uint4 codes = ring.codes(half);
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
        if (GROUPS == 1 && half == 0) read_group<IS_SHORT>(0);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            if (GROUPS == 4 && step % 2 == 0) read_group<IS_SHORT>(2 * half + step / 2);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const auto codes = code_pair<T>(words[step], i, offsets[i % 2]);
                factors[4 * step + i] = scales[i % 2].template times<IS_SHORT>(codes);
            }
        }
    }

    // Multiply with the next slot's x; when the products before have ended, free their slot and make
    // factors of half a unit where theirs were: the second of the current unit, or the first of the next.
    template <bool IS_SHORT, int HALF>
    __device__ __forceinline__ void advance(const uint32_t (&own)[16], uint32_t (&other)[16]) {
        const uint64_t x = matrix_at(memory.x + slot * Shape::X_BYTES, 16, 1024);
        barrier_wait(&memory.full[slot], parity);
        pin(sums);
        products_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
            RegisterProduct<T, ROWS>::add(sums, own + 4 * step, x + 2 * step);
        }
        products_commit();
        products_wait<1>();
#pragma unroll
        for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(other[i])::"memory");
        if (lane == 0) barrier_arrive(before);
        before = &memory.empty[slot];
        if (++slot == Shape::SLOTS) slot = 0, parity ^= 1;
        widen<IS_SHORT>(HALF, other);
    }

    // Multiply the next `count` units. The factors of their first half are there, and then those of the
    // unit behind them.
    template <bool IS_SHORT>
    __device__ __forceinline__ void multiply(int count, uint32_t (&first)[16]) {
        uint32_t second[16] = {};
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i) sums[i] = 0.0f;
#pragma unroll 1
        for (; count > 0; --count) {
            advance<IS_SHORT, 1>(first, second);
            advance<IS_SHORT, 0>(second, first);
        }
        products_wait<0>();
        pin(sums);
    }

    // The next unit to multiply: its first half's codes are factors already.
    __device__ __forceinline__ int next_unit() const {
        return shares.first_of(blockIdx.x + 1) - (left + AHEAD + 1);
    }

    // Make all of the block's tiles.
    __device__ __forceinline__ void work() {
        const bool is_short = !PairScale<T>::IS_SPLIT || a.has_short_scales;
        uint32_t factors[16];
        widen<false>(0, factors);
        wait_for_previous();
        const int end = shares.first_of(blockIdx.x + 1);
        for (int unit = next_unit(); unit < end; unit = next_unit()) {
            const int which = unit / shares.units_of_tile;
            const int count = min(end, (which + 1) * shares.units_of_tile) - unit;
            if (is_short) {
                multiply<true>(count, factors);
            } else {
                multiply<false>(count, factors);
            }
            finish(which);
        }
    }

    // Write a tile, or this block's rows of it if it was made by several.
    __device__ __forceinline__ void finish(int which) {
        place = ManyPlace(a, shares, which, ROWS);
        first_eight = 0;
        end_eight = (min(ROWS, a.rows - place.row) + 7) / 8;
        const TileShares of = shares.of_tile(which, blockIdx.x);
        if (of.end - of.first == 1 || gather(of)) write();
    }

    // Leave sums to the others of a tile, and replace those of the rows that this block writes by all
    // blocks'. Returns whether there are such rows.
    __device__ __forceinline__ bool gather(const TileShares& of) {
        float4* partial = reinterpret_cast<float4*>(a.partial);
        const auto at = [&](int block) {
            const int64_t place = shares.place_of(of, block);
            return partial + place * (ROWS / 8) * Shape::CONSUMERS + thread;
        };
        const int writers = of.end_writer - of.first, own = blockIdx.x - of.first;
        const bool is_writer = own < writers;
        const int eights = end_eight;
        first_eight = is_writer ? eights * own / writers : 0;
        end_eight = is_writer ? eights * (own + 1) / writers : 0;
        float4* to = at(blockIdx.x);
#pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
            if (i >= eights || (i >= first_eight && i < end_eight)) continue;
            __stcg(to + i * Shape::CONSUMERS, make_float4(sums[4 * i], sums[4 * i + 1],
                                                          sums[4 * i + 2], sums[4 * i + 3]));
        }
        memory_fence();
        consumers_meet();
        int* arrived = a.arrived + of.first;
        if (thread == 0) {
            atomicAdd(arrived, 1);
            if (is_writer) {
                const int all = of.end - of.first;
                while (*static_cast<volatile int*>(arrived) < all) {
                }
                // Who leaves last makes it zero again.
                if (atomicAdd(arrived, 1) == all + writers - 1) *arrived = 0;
            }
        }
        if (!is_writer) return false;
        consumers_meet();
        memory_fence();
        for (int other = of.first; other < of.end; ++other) {
            if (other != blockIdx.x) add_sums(at(other));
        }
        return first_eight < end_eight;
    }

    // Add a block's sums of the rows that this block writes; several are on their way at a time.
    __device__ __forceinline__ void add_sums(const float4* from) {
        constexpr int BATCH = ROWS <= 128 ? ROWS / 8 : ROWS == 256 ? 8 : ROWS / 16;
        static_assert(ROWS / 8 % BATCH == 0, "whole batches");
#pragma unroll
        for (int first = 0; first < ROWS / 8; first += BATCH) {
            float4 found[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int eight = first + i;
                found[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
                if (eight >= first_eight && eight < end_eight) {
                    found[i] = __ldcg(from + eight * Shape::CONSUMERS);
                }
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                float* four = sums + 4 * (first + i);
                four[0] += found[i].x;
                four[1] += found[i].y;
                four[2] += found[i].z;
                four[3] += found[i].w;
            }
        }
    }

    // What this thread wrote before is there for whoever sees what it writes after; not all in one order.
    static __device__ __forceinline__ void memory_fence() {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }

    static __device__ __forceinline__ void consumers_meet() {
        asm volatile("bar.sync 1, 256;" ::: "memory");
    }

    // Turn the output round in shared memory, so that rows of it are written 16 bytes at a time.
    __device__ __forceinline__ void write() {
        const int output = place.first_of(a, tile) + lane / 4;
        if (a.bias != nullptr && place.has(a, tile)) {
            const T* bias = static_cast<const T*>(a.bias) + output;
            const float low = N::wide(bias[0]), high = N::wide(bias[8]);
#pragma unroll
            for (int i = 0; i < ROWS / 2; ++i) sums[i] += i & 2 ? high : low;
        }
        T* turned = reinterpret_cast<T*>(memory.turned);
        const int row = lane / 16 * 8 + lane % 8;
        const uint32_t to = shared_address(turned + row * Shape::OUT_STRIDE + tile * TILE_OUT +
                                           lane / 8 % 2 * 8);
        // Rows are written by the same instructions each time: they are many, and used once a tile.
#pragma unroll 1
        for (int first = 0; first < ROWS; first += Shape::TURNED) {
            if (8 * first_eight >= first + Shape::TURNED || 8 * end_eight <= first) continue;
            consumers_meet();
#pragma unroll
            for (int i = 0; i < ROWS / 16; ++i) {
                if (i * 16 / Shape::TURNED * Shape::TURNED == first) turn(to, i);
            }
            consumers_meet();
            write_turned(turned, first);
        }
    }

    __device__ __forceinline__ void turn(uint32_t to, int sixteen) {
        const float* four = sums + 8 * sixteen;
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                to + sixteen % (Shape::TURNED / 16) * 16 * Shape::OUT_STRIDE * 2),
            "r"(N::pack(four[0], four[1])), "r"(N::pack(four[2], four[3])),
            "r"(N::pack(four[4], four[5])), "r"(N::pack(four[6], four[7]))
            : "memory");
    }

    // Write rows that lie turned round, from the tile's row number `first` on.
    __device__ __forceinline__ void write_turned(const T* turned, int first) {
        if (a.gated) {
            write_rows<Shape::OUTPUTS / 16>(turned, first, a.num_out / 2, [](const T* from) {
                uint4 found = *reinterpret_cast<const uint4*>(from);
                const uint4 factors = *reinterpret_cast<const uint4*>(from + Shape::OUTPUTS / 2);
                T* values = reinterpret_cast<T*>(&found);
                const T* others = reinterpret_cast<const T*>(&factors);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float gate = N::wide(values[i]);
                    const float opened = N::wide(N::rounded(__fdividef(gate, 1.0f + __expf(-gate))));
                    values[i] = N::rounded(opened * N::wide(others[i]));
                }
                return found;
            });
        } else {
            write_rows<Shape::OUTPUTS / 8>(turned, first, a.num_out, [](const T* from) {
                return *reinterpret_cast<const uint4*>(from);
            });
        }
    }

    // Write VECTORS vectors of eight outputs of each row, which `take` reads.
    template <int VECTORS, typename Take>
    __device__ __forceinline__ void write_rows(const T* turned, int first, int num_out, Take take) {
        const int column = thread % VECTORS * 8, output = place.output + column;
        const int begin = max(8 * first_eight, first);
        const int end = min(min(8 * end_eight, first + Shape::TURNED), a.rows - place.row);
        if (output >= num_out) return;
        T* out = static_cast<T*>(a.out) + place.row * a.out_stride + output;
#pragma unroll 1
        for (int n = begin + thread / VECTORS; n < end; n += Shape::CONSUMERS / VECTORS) {
            *reinterpret_cast<uint4*>(out + n * a.out_stride) =
                take(turned + (n - first) * Shape::OUT_STRIDE + column);
        }
    }
};

// GROUPS: how many groups of inputs a unit has place for.
template <typename T, int ROWS, int GROUPS>
__global__ void __launch_bounds__(ManyShape<ROWS, GROUPS>::THREADS, 1)
    many_rows(const __grid_constant__ CUtensorMap map, const __grid_constant__ PackedArguments a,
              const __grid_constant__ Shares shares) {
    using Shape = ManyShape<ROWS, GROUPS>;
    extern __shared__ uint8_t shared[];
    let_next_begin();
    const ManyMemory<Shape> memory(shared);
    const Units units = shares.of_block(blockIdx.x);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::SLOTS; ++i) {
            barrier_init(&memory.full[i], 1);
            barrier_init(&memory.empty[i], Shape::CONSUMERS / 32);
        }
        barrier_init(memory.unused, Shape::CONSUMERS / 32);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fence_async_proxy();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        const int row = ManyPlace(a, shares, units.tile, ROWS).row;
        give_registers<24>();
        wait_for_previous();
        if (threadIdx.x == 0) copy_all<Shape, ROWS>(&map, memory, a, units, row);
        return;
    }
    take_registers<240>();
    ManyConsumer<T, ROWS, GROUPS>(a, shares, memory, units).work();
}

}  // namespace quire
