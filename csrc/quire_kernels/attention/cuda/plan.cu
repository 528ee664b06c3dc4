// The split plan of sequences with one token, made on the device once a step.

#include <cuda_runtime.h>

#include "arguments.h"
#include "tensor_cores.cuh"

namespace quire {

constexpr int THREADS = 1024;
// Splits begin at multiples of so many keys.
constexpr int GRAIN = 64;

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Return the sum over threads up to and with the own one, and in `all` that over all threads.
__device__ int running_sum(int x, int* of_warps, int* all) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int step = 1; step < 32; step *= 2) {
        const int before = __shfl_up_sync(0xFFFFFFFF, x, step);
        if (lane >= step) x += before;
    }
    __syncthreads();
    if (lane == 31) of_warps[warp] = x;
    __syncthreads();
    int before = 0, sum = 0;
    for (int i = 0; i < THREADS / 32; ++i) {
        if (i < warp) before += of_warps[i];
        sum += of_warps[i];
    }
    *all = sum;
    return x + before;
}

// The keys that a row sees, none where the row has not one token.
struct Span {
    int first, length;
    bool is_single;

    __device__ Span(const Arguments& a, int row) : first(0), length(0) {
        is_single = row < a.num_rows && a.starts[row + 1] - a.starts[row] == 1;
        if (!is_single) return;
        const int seq_len = a.seq_lens[row];
        if (a.window) first = max(seq_len - a.window, 0) / GRAIN * GRAIN;
        length = seq_len - first;
    }
};

// Return the place of a thread's row among `num_rows` of the block, those with the largest items
// first: what begins late should end soon. Threads behind the rows keep their places.
__device__ int place_by_size(int grains, int num_rows, int* keys) {
    const int own = threadIdx.x;
    const int key = grains * THREADS + THREADS - 1 - own;
    __syncthreads();
    keys[own] = key;
    __syncthreads();
    if (own >= num_rows) return own;
    int place = 0;
#pragma unroll 8
    for (int i = 0; i < num_rows; ++i) place += keys[i] > key;
    return place;
}

// Cut the keys that rows see into items of about equal size, by one block, and sort each 1,024 rows.
//
// With chunks of at least total / extra keys no more than num_rows + extra items come out, since
// only a row's last item is shorter. `few_extra` fills the GPU once, if need be by items of
// few_chunk keys; `num_extra` evens its load out, by items of `chunk` or more. An empty row has
// one item without keys, which writes its zeros; a row that has not one token has none.
__global__ void __launch_bounds__(THREADS) plan_splits(const __grid_constant__ Arguments a) {
    __shared__ int of_warps[THREADS / 32], keys[THREADS], splits[THREADS];
    wait_for_previous();
    int total = 0;
    for (int base = 0; base < a.num_rows; base += THREADS) {
        int sum;
        running_sum(Span(a, base + threadIdx.x).length, of_warps, &sum);
        total += sum;
    }
    const int few_chunk = max(ceil_div(total, a.few_extra), a.few_chunk);
    const int chunk = min(few_chunk, max(ceil_div(total, a.num_extra), a.chunk));
    int before = 0;
    for (int base = 0; base < a.num_rows; base += THREADS) {
        const int row = base + threadIdx.x;
        const Span span(a, row);
        int num_splits = max(ceil_div(span.length, chunk), 1);
        // Equal pieces instead of whole chunks and a rest; rounded to grains, they may be fewer.
        const int grains = max(ceil_div(ceil_div(span.length, num_splits), GRAIN), 1);
        const int piece = grains * GRAIN;
        num_splits = span.is_single ? max(ceil_div(span.length, piece), 1) : 0;
        const int size = span.is_single ? grains : 0;
        const int place = place_by_size(size, min(a.num_rows - base, THREADS), keys);
        splits[place] = num_splits;
        __syncthreads();
        int sum;
        const int own = splits[threadIdx.x];
        const int end = running_sum(own, of_warps, &sum);
        splits[threadIdx.x] = before + end - own;
        __syncthreads();
        const int first = splits[place];
        before += sum;
        if (row < a.num_rows) a.first_items[row] = first;
        for (int i = 0; i < num_splits; ++i) {
            const int begin = span.first + i * piece;
            const int last = min(begin + piece, span.first + span.length);
            reinterpret_cast<int4*>(a.items)[first + i] = make_int4(row, begin, last, num_splits);
        }
    }
    if (threadIdx.x == 0) a.first_items[a.num_rows] = before;
}

cudaError_t plan(const Arguments& a, cudaStream_t stream) {
    plan_splits<<<1, THREADS, 0, stream>>>(a);
    return cudaGetLastError();
}

}  // namespace quire
