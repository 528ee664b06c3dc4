// Units of 128 inputs on their way to a warp: a ring in shared memory of its own, so that it waits for
// no other.
//
// Copies complete in their order, which loads into registers do not: there, waiting for the oldest of
// eight was waiting for all of them, and one row through 4096 -> 57344 took 34 us on an H200.
#pragma once

#include "../../attention/cuda/tensor_cores.cuh"
#include "arguments.h"
#include "codes.cuh"

namespace quire {

// GROUPS: how many groups of inputs a unit has place for, 1 or 4. At most DEPTH - 1 units are on their
// way.
template <int GROUPS, int DEPTH>
struct UnitRing {
    // Scales of 16 outputs, their zero points, and 8 bytes of nothing.
    static constexpr int GROUP_BYTES = 48;
    static constexpr int SLOT_BYTES = 2 * TILE_BYTES + GROUPS * GROUP_BYTES;
    static constexpr int BYTES = DEPTH * SLOT_BYTES;
    static constexpr int AHEAD = DEPTH - 1;

    const uint32_t begin;
    const int lane, shift, in_features;
    // Of the 16 outputs that are fetched: this lane's codes; what it copies of a group, and how far
    // the next group is.
    const uint8_t *codes_at, *group_at;
    int group_stride;
    uint32_t tail, head;

    __device__ __forceinline__ UnitRing(const PackedArguments& a, void* memory, int lane)
        : begin(static_cast<uint32_t>(__cvta_generic_to_shared(memory))),
          lane(lane),
          shift(a.group_shift),
          in_features(a.in_features),
          tail(begin),
          head(begin) {}

    // Which four bytes of a group a lane copies: of 40, so that some lanes do what others do too.
    __device__ __forceinline__ int own() const { return lane % 16 < 10 ? lane % 16 : lane % 16 - 6; }

    // Fetch tiles of 16 outputs, number `place`, from now on. Of a group eight lanes copy two scales each,
    // two eight zero points; the other half of the lanes those of the next group.
    __device__ __forceinline__ void go_to(const PackedArguments& a, int place) {
        const int64_t tiles = int64_t(place) * (a.in_features / TILE_IN);
        codes_at = a.tiles + tiles * TILE_BYTES + lane * 16;
        const bool is_scale = own() < 8;
        group_stride = static_cast<int>(is_scale ? a.scale_stride * 2 : a.zero_stride);
        group_at = is_scale ? reinterpret_cast<const uint8_t*>(a.scales) + place * 32 + 4 * own()
                            : a.zeros + place * 8 + 4 * (own() - 8);
    }

    // Ask for a unit; where none is wanted, and behind the last input, codes are zeros.
    __device__ __forceinline__ void fetch(int unit, bool is_wanted) {
        const uint8_t* from = codes_at + int64_t(unit) * (2 * TILE_BYTES);
        copy_16_bytes(tail + lane * 16, from, is_wanted);
        copy_16_bytes(tail + TILE_BYTES + lane * 16, from + TILE_BYTES,
                      is_wanted && unit * UNIT_IN + TILE_IN < in_features);
#pragma unroll
        for (int first = 0; first < GROUPS; first += 2) {
            const int number = GROUPS == 1 ? 0 : first + lane / 16;
            const int input = unit * UNIT_IN + number * (UNIT_IN / GROUPS);
            asm volatile(
                "cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(of_group(tail, number) +
                                                                       4 * own()),
                "l"(group_at + int64_t(input >> shift) * group_stride),
                "r"(is_wanted && input < in_features ? 4 : 0)
                : "memory");
        }
        copies_commit();
        tail += SLOT_BYTES;
        if (tail == begin + BYTES) tail = begin;
    }

    // Wait for the oldest unit. The slot of the one before it is free then.
    __device__ __forceinline__ void wait() const {
        copies_wait<DEPTH - 2>();
        __syncwarp();
    }

    // This lane's codes of half of the oldest unit: a word for each 16 inputs.
    __device__ __forceinline__ uint4 codes(int half) const {
        uint4 found;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
                     : "r"(head + half * TILE_BYTES + lane * 16)
                     : "memory");
        return found;
    }

    // The scale of output lane / 4 + 8 * h.
    __device__ __forceinline__ __half scale(int group, int h) const {
        uint16_t found;
        asm volatile("ld.shared.u16 %0, [%1];"
                     : "=h"(found)
                     : "r"(of_group(head, group) + lane / 4 * 2 + 16 * h)
                     : "memory");
        return bits_as<__half>(found);
    }

    template <typename T>
    __device__ __forceinline__ uint32_t offset(int group, int h) const {
        uint32_t eight;
        asm volatile("ld.shared.u32 %0, [%1];"
                     : "=r"(eight)
                     : "r"(of_group(head, group) + 32 + 4 * h)
                     : "memory");
        return offset_of<T>(eight >> (lane & 28) & 15);
    }

    __device__ __forceinline__ void advance() {
        head += SLOT_BYTES;
        if (head == begin + BYTES) head = begin;
    }

  private:
    static __device__ __forceinline__ uint32_t of_group(uint32_t slot, int group) {
        return slot + 2 * TILE_BYTES + group * GROUP_BYTES;
    }
};

}  // namespace quire
