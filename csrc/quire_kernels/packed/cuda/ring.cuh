// Tiles on their way to a warp: a ring in shared memory of its own, so that it waits for no other.
//
// Copies complete in their order, which loads into registers do not: there, waiting for the oldest of
// eight was waiting for all of them, and one row through 4096 -> 57344 took 34 us on an H200.
#pragma once

#include "../../attention/cuda/tensor_cores.cuh"
#include "arguments.h"
#include "codes.cuh"

namespace quire {

// GROUPS: how many groups of inputs a tile crosses. At most DEPTH - 1 tiles are on their way.
template <int GROUPS, int DEPTH>
struct TileRing {
    // Scales of 16 outputs, their zero points, and 8 bytes of nothing.
    static constexpr int GROUP_BYTES = 48;
    static constexpr int SLOT_BYTES = TILE_BYTES + GROUPS * GROUP_BYTES;
    static constexpr int BYTES = DEPTH * SLOT_BYTES;

    const uint32_t begin;
    const int lane, shift;
    // Of the 16 outputs that are fetched: this lane's codes; what it copies of a group, and how far
    // the next group is.
    const uint8_t *codes_at, *group_at;
    int group_stride;
    uint32_t tail, head;

    __device__ __forceinline__ TileRing(const PackedArguments& a, void* memory, int lane)
        : begin(static_cast<uint32_t>(__cvta_generic_to_shared(memory))),
          lane(lane),
          shift(a.group_shift),
          tail(begin),
          head(begin) {}

    // Fetch tiles of 16 outputs, number `place`, from now on. Lanes 0 to 7 copy two scales each, 8 and 9
    // eight zero points; 16 to 25 those of a second group.
    __device__ __forceinline__ void go_to(const PackedArguments& a, int place) {
        const int64_t tiles = int64_t(place) * (a.in_features / TILE_IN);
        codes_at = a.tiles + tiles * TILE_BYTES + lane * 16;
        const int own = lane % 16;
        const bool is_scale = own < 8;
        group_stride = static_cast<int>(is_scale ? a.scale_stride * 2 : a.zero_stride);
        group_at = is_scale ? reinterpret_cast<const uint8_t*>(a.scales) + place * 32 + 4 * own
                            : a.zeros + place * 8 + 4 * (own - 8);
    }

    // Ask for 64 inputs, number `chunk`; where none are wanted they are zeros.
    __device__ __forceinline__ void fetch(int chunk, bool is_wanted) {
        copy_16_bytes(tail + lane * 16, codes_at + int64_t(chunk) * TILE_BYTES, is_wanted);
        const int half = lane / 16;
        const int group = (chunk * TILE_IN + half * 32) >> shift;
        asm volatile(
            "{\n.reg .pred copies;\nsetp.ne.s32 copies, %3, 0;\n"
            "@copies cp.async.ca.shared.global [%0], [%1], 4, %2;\n}\n" ::"r"(
                tail + TILE_BYTES + half * GROUP_BYTES + 4 * (lane % 16)),
            "l"(group_at + int64_t(group) * group_stride), "r"(is_wanted ? 4 : 0),
            "r"(int(lane % 16 < 10 && half < GROUPS))
            : "memory");
        copies_commit();
        tail += SLOT_BYTES;
        if (tail == begin + BYTES) tail = begin;
    }

    // Wait for the oldest tile. The slot of the one before it is free then.
    __device__ __forceinline__ void wait() const {
        copies_wait<DEPTH - 2>();
        __syncwarp();
    }

    // This lane's codes of the oldest tile: a word for each 16 inputs.
    __device__ __forceinline__ uint4 codes() const {
        uint4 found;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
                     : "r"(head + lane * 16)
                     : "memory");
        return found;
    }

    // The scale of output lane / 4 + 8 * h.
    __device__ __forceinline__ __half scale(int group, int h) const {
        uint16_t found;
        asm volatile("ld.shared.u16 %0, [%1];"
                     : "=h"(found)
                     : "r"(of_group(group) + lane / 4 * 2 + 16 * h)
                     : "memory");
        return bits_as<__half>(found);
    }

    template <typename T>
    __device__ __forceinline__ uint32_t offset(int group, int h) const {
        uint32_t eight;
        asm volatile("ld.shared.u32 %0, [%1];"
                     : "=r"(eight)
                     : "r"(of_group(group) + 32 + 4 * h)
                     : "memory");
        return offset_of<T>(eight >> (lane & 28) & 15);
    }

    __device__ __forceinline__ void advance() {
        head += SLOT_BYTES;
        if (head == begin + BYTES) head = begin;
    }

  private:
    __device__ __forceinline__ uint32_t of_group(int group) const {
        return head + TILE_BYTES + group * GROUP_BYTES;
    }
};

}  // namespace quire
