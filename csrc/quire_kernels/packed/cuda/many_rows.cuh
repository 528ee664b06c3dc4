// Products of more than a few rows on compute capability 9.0a.
//
// A block of 3 warpgroups makes 128 outputs of ROWS rows, of all inputs or, split, of some. The first
// has rows of x copied into a ring in shared memory, 64 inputs at a time. The other two own 64 outputs
// each, the rows of their products: a warp has its tiles of codes copied and makes factors of them in
// registers, while the products with those before run; x is the other factor as it lies in shared
// memory. Having codes copied for all, ten copies of 512 bytes or less a step, took 0.7 us a step.
//
// Blocks that share outputs and rows leave each other sums. Where all are on the GPU at once each adds
// those of some rows, else the last of them to come those of all; always in their order.
//
// Gated, a block makes 64 outputs of each part: the first warpgroup silu's argument, the second what
// it is multiplied with.
#pragma once

#include "register_products.cuh"
#include "ring.cuh"

namespace quire {

template <int ROWS, int GROUPS>
struct ManyShape {
    static constexpr int OUTPUTS = 128;
    static constexpr int THREADS = 384;
    static constexpr int CONSUMERS = 256;
    static constexpr int X_BYTES = ROWS * 128;
    static constexpr int BLOCKS = ROWS <= 64 ? 2 : 1;
    using Ring = TileRing<GROUPS, 8>;
    static constexpr int RING_BYTES = CONSUMERS / 32 * Ring::BYTES;
    static constexpr int FIT = (230000 / BLOCKS - RING_BYTES - 2048) / X_BYTES;
    static constexpr int SLOTS = FIT < 8 ? FIT : 8;
    // The last 1,024 are for the alignment of the first slot.
    static constexpr int SHARED_BYTES = SLOTS * X_BYTES + RING_BYTES + 256 + 1024;
    // Numbers between two rows of the output in shared memory, so that banks differ.
    static constexpr int OUT_STRIDE = OUTPUTS + 8;
    static_assert(ROWS * OUT_STRIDE * 2 <= SLOTS * X_BYTES, "the output takes the slots' place");
};

template <typename Shape>
struct ManyMemory {
    uint8_t *x, *rings;
    uint64_t *full, *empty;
    int* is_last;

    __device__ __forceinline__ explicit ManyMemory(uint8_t* raw) {
        x = raw + (1024 - (shared_address(raw) & 1023)) % 1024;
        rings = x + Shape::SLOTS * Shape::X_BYTES;
        full = reinterpret_cast<uint64_t*>(rings + Shape::RING_BYTES);
        empty = full + Shape::SLOTS;
        is_last = reinterpret_cast<int*>(empty + Shape::SLOTS);
    }
};

// What a block works on: 128 outputs (gated, from `output` of each part 64), ROWS rows and the tiles
// of inputs [first, end).
struct ManyPlace {
    int output, row, first, end, number;

    // The first of 16 outputs, by their number in the block, and whether there are any.
    __device__ __forceinline__ int first_of(const PackedArguments& a, int tile) const {
        if (!a.gated) return output + tile * TILE_OUT;
        return tile / 4 * (a.num_out / 2) + output + tile % 4 * TILE_OUT;
    }

    __device__ __forceinline__ bool has(const PackedArguments& a, int tile) const {
        return a.gated ? output + tile % 4 * TILE_OUT < a.num_out / 2
                       : output + tile * TILE_OUT < a.num_out;
    }

    template <int ROWS>
    static __device__ __forceinline__ ManyPlace of(const PackedArguments& a) {
        const int row_tiles = (a.rows + ROWS - 1) / ROWS;
        const int number = blockIdx.x / a.splits, split = blockIdx.x % a.splits;
        const int chunks = a.in_features / TILE_IN;
        return {number / row_tiles * (a.gated ? 64 : 128), number % row_tiles * ROWS,
                int(int64_t(chunks) * split / a.splits),
                int(int64_t(chunks) * (split + 1) / a.splits), number};
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

// Have all rows of a block copied, by one thread.
template <typename Shape>
__device__ __forceinline__ void copy_all(const CUtensorMap* map, const ManyMemory<Shape>& memory,
                                         const ManyPlace& place) {
    int slot = 0, parity = 1;
    for (int chunk = place.first; chunk < place.end; ++chunk) {
        barrier_wait(&memory.empty[slot], parity);
        barrier_expect(&memory.full[slot], Shape::X_BYTES);
        copy_rows(memory.x + slot * Shape::X_BYTES, map, chunk * TILE_IN, place.row,
                  &memory.full[slot]);
        if (++slot == Shape::SLOTS) slot = 0, parity ^= 1;
    }
}

template <typename T, int ROWS, int GROUPS>
struct ManyConsumer {
    using Shape = ManyShape<ROWS, GROUPS>;
    using Ring = typename Shape::Ring;
    using N = Number<T>;
    const PackedArguments& a;
    const ManyMemory<Shape>& memory;
    const ManyPlace& place;
    const int thread, tile, lane;
    Ring ring;
    float sums[ROWS / 2];
    int slot = 0, parity = 0, fetched;
    // Eights of rows that this block writes.
    int first_eight = 0, end_eight = ROWS / 8;
    const bool has_outputs;

    // The first tiles are on their way while the kernel before ends.
    __device__ __forceinline__ ManyConsumer(const PackedArguments& a,
                                            const ManyMemory<Shape>& memory,
                                            const ManyPlace& place)
        : a(a),
          memory(memory),
          place(place),
          thread(threadIdx.x - 128),
          tile(thread / 32),
          lane(thread % 32),
          ring(a, memory.rings + tile * Ring::BYTES, lane),
          fetched(place.first),
          has_outputs(place.has(a, tile)) {
        ring.go_to(a, has_outputs ? place.first_of(a, tile) / TILE_OUT : 0);
        for (int i = 0; i < Ring::BYTES / Ring::SLOT_BYTES - 1; ++i) fetch();
    }

    __device__ __forceinline__ void fetch() {
        const bool is_wanted = fetched < place.end && has_outputs;
        ring.fetch(is_wanted ? fetched : 0, is_wanted);
        ++fetched;
    }

    // Make the 4 factors of each of 4 products of the next tile's codes.
    __device__ __forceinline__ void widen(uint32_t (&factors)[16]) {
        ring.wait();
        fetch();
        const uint4 codes = ring.codes();
        const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            const PairScale<T> scales[2] = {PairScale<T>(ring.scale(group, 0)),
                                            PairScale<T>(ring.scale(group, 1))};
            const uint32_t offsets[2] = {ring.template offset<T>(group, 0),
                                         ring.template offset<T>(group, 1)};
#pragma unroll
            for (int step = group * 4 / GROUPS; step < (group + 1) * 4 / GROUPS; ++step) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    factors[4 * step + i] =
                        scales[i % 2].times(code_pair<T>(words[step], i, offsets[i % 2]));
                }
            }
        }
        ring.advance();
    }

    // Multiply with the slot's x; when the products before have ended, free their slot and widen the
    // next tile's codes into their factors.
    __device__ __forceinline__ void advance(int chunk, uint32_t (&own)[16],
                                            uint32_t (&other)[16]) {
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
        if (chunk > place.first && lane == 0) {
            barrier_arrive(&memory.empty[slot == 0 ? Shape::SLOTS - 1 : slot - 1]);
        }
        if (++slot == Shape::SLOTS) slot = 0, parity ^= 1;
        if (chunk + 1 < place.end) widen(other);
    }

    __device__ __forceinline__ void multiply_all() {
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i) sums[i] = 0.0f;
        uint32_t even[16], odd[16] = {};
        widen(even);
        int chunk = place.first;
        for (; chunk + 1 < place.end; chunk += 2) {
            advance(chunk, even, odd);
            advance(chunk + 1, odd, even);
        }
        if (chunk < place.end) advance(chunk, even, odd);
        products_wait<0>();
        pin(sums);
    }

    // Leave the sums to the others, and replace those of the rows that this block writes by all
    // blocks'. Returns whether there are such rows.
    __device__ __forceinline__ bool gather() {
        const int64_t all = int64_t(place.number) * a.splits;
        float4* partial = reinterpret_cast<float4*>(a.partial);
        const auto at = [&](int split, int i) {
            return partial + ((all + split) * (ROWS / 8) + i) * Shape::CONSUMERS + thread;
        };
        const int split = blockIdx.x % a.splits;
        if (a.all_at_once) {
            first_eight = ROWS / 8 * split / a.splits;
            end_eight = ROWS / 8 * (split + 1) / a.splits;
        }
#pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
            if (a.all_at_once && i >= first_eight && i < end_eight) continue;
            __stcg(at(split, i), make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2],
                                             sums[4 * i + 3]));
        }
        __threadfence();
        consumers_meet();
        int* arrived = a.arrived + place.number;
        if (thread == 0) {
            const int before = atomicAdd(arrived, 1);
            *memory.is_last = a.all_at_once || before == a.splits - 1;
            if (a.all_at_once) {
                while (*static_cast<volatile int*>(arrived) < a.splits) {
                }
                // Who leaves last makes it zero again.
                if (atomicAdd(arrived, 1) == 2 * a.splits - 1) *arrived = 0;
            } else if (before == a.splits - 1) {
                *arrived = 0;
            }
        }
        consumers_meet();
        if (!*memory.is_last) return false;
        __threadfence();
        // The order of the sum must not depend on who came last.
        if (!a.all_at_once) {
#pragma unroll
            for (int i = 0; i < ROWS / 2; ++i) sums[i] = 0.0f;
        }
        for (int other = 0; other < a.splits; ++other) {
            if (a.all_at_once && other == split) continue;
            add_sums(at(other, 0));
        }
        return first_eight < end_eight;
    }

    // Add a block's sums of the rows that this block writes; several are on their way at a time.
    __device__ __forceinline__ void add_sums(const float4* from) {
        constexpr int BATCH = ROWS % 64 == 0 ? 8 : ROWS % 32 == 0 ? 4 : 2;
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

    static __device__ __forceinline__ void consumers_meet() {
        asm volatile("bar.sync 1, 256;" ::: "memory");
    }

    // Turn the output round in shared memory, so that rows of it are written 16 bytes at a time.
    __device__ __forceinline__ void write() {
        const int output = place.first_of(a, tile) + lane / 4;
        if (a.bias != nullptr && has_outputs) {
            const T* bias = static_cast<const T*>(a.bias) + output;
            const float low = N::wide(bias[0]), high = N::wide(bias[8]);
#pragma unroll
            for (int i = 0; i < ROWS / 2; ++i) sums[i] += i & 2 ? high : low;
        }
        T* turned = reinterpret_cast<T*>(memory.x);
        consumers_meet();
        const int row = lane / 16 * 8 + lane % 8;
        const uint32_t to = shared_address(turned + row * Shape::OUT_STRIDE + tile * TILE_OUT +
                                           lane / 8 % 2 * 8);
#pragma unroll
        for (int i = 0; i < ROWS / 16; ++i) {
            const float* four = sums + 8 * i;
            asm volatile(
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                    to + i * 16 * Shape::OUT_STRIDE * 2),
                "r"(N::pack(four[0], four[1])), "r"(N::pack(four[2], four[3])),
                "r"(N::pack(four[4], four[5])), "r"(N::pack(four[6], four[7]))
                : "memory");
        }
        consumers_meet();
        if (a.gated) {
            write_rows<Shape::OUTPUTS / 16>(turned, a.num_out / 2, [](const T* from) {
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
            write_rows<Shape::OUTPUTS / 8>(turned, a.num_out, [](const T* from) {
                return *reinterpret_cast<const uint4*>(from);
            });
        }
    }

    // Write this block's rows, of VECTORS vectors of eight outputs each, which `take` reads.
    template <int VECTORS, typename Take>
    __device__ __forceinline__ void write_rows(const T* turned, int num_out, Take take) {
        const int column = thread % VECTORS * 8, first = place.output + column;
        const int end = min(8 * end_eight, a.rows - place.row);
        if (first >= num_out) return;
        T* out = static_cast<T*>(a.out) + place.row * a.out_stride + first;
        for (int n = 8 * first_eight + thread / VECTORS; n < end; n += Shape::CONSUMERS / VECTORS) {
            *reinterpret_cast<uint4*>(out + n * a.out_stride) =
                take(turned + n * Shape::OUT_STRIDE + column);
        }
    }
};

// GROUPS: how many groups of inputs a tile crosses.
template <typename T, int ROWS, int GROUPS>
__global__ void __launch_bounds__(ManyShape<ROWS, GROUPS>::THREADS,
                                  ManyShape<ROWS, GROUPS>::BLOCKS)
    many_rows(const __grid_constant__ CUtensorMap map, const PackedArguments a) {
    using Shape = ManyShape<ROWS, GROUPS>;
    extern __shared__ uint8_t shared[];
    let_next_begin();
    const ManyMemory<Shape> memory(shared);
    const ManyPlace place = ManyPlace::of<ROWS>(a);
    if (threadIdx.x == 0) {
        for (int i = 0; i < Shape::SLOTS; ++i) {
            barrier_init(&memory.full[i], 1);
            barrier_init(&memory.empty[i], Shape::CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        fence_async_proxy();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<Shape::BLOCKS == 2 ? 40 : 24>();
        wait_for_previous();
        if (threadIdx.x == 0) copy_all<Shape>(&map, memory, place);
        return;
    }
    take_registers<Shape::BLOCKS == 2 ? 96 : 240>();
    ManyConsumer<T, ROWS, GROUPS> consumer(a, memory, place);
    wait_for_previous();
    consumer.multiply_all();
    if (a.splits > 1 && !consumer.gather()) return;
    consumer.write();
}

}  // namespace quire
