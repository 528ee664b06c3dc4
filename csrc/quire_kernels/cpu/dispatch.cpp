// The library's doors: which instruction set, how a step is cut into items, who works on them.
#include <dlfcn.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "interface.h"

namespace {

// Work that is worth more than one thread, in multiplications: some 10 us. It is then done by all
// of PyTorch's threads: with a team of another size libgomp ends threads and begins new ones.
const int64_t WORTH_THREADS = 1 << 19;

#if defined(__x86_64__)
// The best instruction set of the processor whose registers the system saves too. Not the
// compiler's own __builtin_cpu_supports: its runtime does not answer in every library.
int best_isa() {
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    bool has_fma = c >> 12 & 1, is_saved = c >> 27 & 1;
    if (!is_saved || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const unsigned saved_256 = 0x06, saved_512 = 0xE6;
    const unsigned bf16_needs = 1u << 11;  // VNNI, which every processor with bfloat16 has
    const unsigned wide = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // AVX-512 F, DQ, BW, VL
    if (!has_fma || !(b >> 5 & 1) || (low & saved_256) != saved_256) return 0;
    if ((b & wide) != wide || (low & saved_512) != saved_512) return 1;
    if (!(c & bf16_needs)) return 2;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1) ? 3 : 2;
}
const int BEST = best_isa();
#else
const int BEST = 0;
#endif

const Kernels *table_of(int isa) {
    if (isa < 0 || isa > BEST) return nullptr;
#if defined(__x86_64__)
    if (isa == 1) return quire_kernels_avx2();
    if (isa == 2) return quire_kernels_avx512();
    if (isa == 3) return quire_kernels_avx512_bf16();
#endif
    return quire_kernels_plain();
}

// The threads that PyTorch's own operations run on, so that the two do not fight for the cores:
// the OpenMP library that it has loaded is asked for by name. Without one there is one thread.
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
const Parallel PARALLEL = (Parallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");

void in_parallel(void (*function)(void *), void *data, int64_t num_threads) {
    if (num_threads > 1 && PARALLEL != nullptr)
        PARALLEL(function, data, (unsigned)num_threads, 0);
    else
        function(data);
}

struct AttendJob {
    const Spec *spec;
    const Step *step;
    const AttendCall *call;
    int64_t next, num_threads;
};

void attend_items(void *data) {
    AttendJob *job = (AttendJob *)data;
    const Step *step = job->step;
    int64_t own = __atomic_fetch_add(&job->num_threads, 1, __ATOMIC_RELAXED);
    const Kernels *kernels = table_of(job->spec->isa);
    while (true) {
        int64_t n = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
        if (n >= step->num_items) return;
        kernels->attend(job->spec, step, job->call, step->items + n, step->scratch + own * step->scratch_size);
    }
}

// Rows, a piece at a time.
struct RowsJob {
    const Kernels *kernels;
    const Spec *spec;
    const void *call;
    int64_t num_rows, piece, next;
    int32_t dtype, kind;
};

void do_rows(void *data) {
    RowsJob *job = (RowsJob *)data;
    while (true) {
        int64_t first = __atomic_fetch_add(&job->next, job->piece, __ATOMIC_RELAXED);
        if (first >= job->num_rows) return;
        int64_t end = first + job->piece < job->num_rows ? first + job->piece : job->num_rows;
        if (job->kind == 0)
            job->kernels->write(job->spec, (const WriteCall *)job->call, first, end);
        else if (job->kind == 1)
            job->kernels->norm(job->dtype, (const RowsCall *)job->call, first, end);
        else if (job->kind == 2)
            job->kernels->silu_mul(job->dtype, (const RowsCall *)job->call, first, end);
        else if (job->kind == 3)
            job->kernels->quantize(job->dtype, (const RowsCall *)job->call, first, end);
        else if (job->kind == 4)
            job->kernels->int8_rows(job->dtype, (const Int8Call *)job->call, first, end);
        else if (job->kind == 5)
            job->kernels->int8_tiles(job->dtype, (const Int8Call *)job->call, first, end);
        else if (job->kind == 6)
            job->kernels->arrange(job->dtype, (const PackedCall *)job->call, first, end);
        else if (job->kind == 7)
            job->kernels->packed(job->dtype, (const PackedCall *)job->call, first, end);
        else
            job->kernels->widen(job->dtype, (const PackedCall *)job->call, first, end);
    }
}

void run_rows(RowsJob job, int64_t row_size, int64_t num_threads) {
    // An element takes some ten times a multiplication.
    if (job.num_rows < 2 || job.num_rows * row_size * 10 < WORTH_THREADS) num_threads = 1;
    job.piece = num_threads < 2 ? job.num_rows : (job.num_rows + 4 * num_threads - 1) / (4 * num_threads);
    in_parallel(do_rows, &job, num_threads);
}

// Outputs of a product, or weights: in pieces of a multiple of `step`, of `work` multiplications.
void run_outputs(RowsJob job, int64_t step, int64_t work, int64_t num_threads) {
    if (work < WORTH_THREADS) num_threads = 1;
    int64_t pieces = num_threads < 2 ? 1 : 16 * num_threads;
    int64_t piece = (job.num_rows + pieces - 1) / pieces;
    job.piece = (piece + step - 1) / step * step;
    in_parallel(do_rows, &job, num_threads);
}

int min_of(int a, int b) { return a < b ? a : b; }

}  // namespace

extern "C" {

// Return whether this processor has an instruction set: 0 plain, 1 avx2, 2 avx512, 3 avx512_bf16.
int quire_has_isa(int isa) { return table_of(isa) != nullptr; }
int quire_has_threads() { return PARALLEL != nullptr; }
int64_t quire_scratch_size(const Spec *spec) { return table_of(spec->isa)->scratch_size(spec); }
int64_t quire_part_size(const Spec *spec) { return table_of(spec->isa)->part_size(spec); }

// Cut a step into items, those of many tokens first. `items` [capacity], `num_parts` [capacity].
// `found`: items, parts, threads. Returns 0 where the capacity is too small, which is our mistake.
int quire_cut(const Spec *spec, const int32_t *seq_lens, const int32_t *starts, int num_seqs,
              Item *items, int32_t *num_parts, int64_t capacity, int64_t *found) {
    int group = spec->num_heads / spec->num_kv_heads;
    int tile = group >= TILE_ROWS ? 1 : TILE_ROWS / group;
    int64_t num_items = 0, parts = 0, work = 0;
    int64_t whole = 0;
    for (int s = 0; s < num_seqs; ++s) whole += (starts[s + 1] - starts[s] + tile - 1) / tile;
    bool is_cut = whole * spec->num_kv_heads < 4 * (int64_t)spec->num_threads;
    for (int s = num_seqs - 1; s >= 0; --s) {
        int count = starts[s + 1] - starts[s], seq_len = seq_lens[s];
        for (int first = (count - 1) / tile * tile; first >= 0 && count > 0; first -= tile) {
            int num = min_of(tile, count - first), position = seq_len - count + first;
            int seen = spec->window > 0 && position >= spec->window ? position - spec->window + 1 : 0;
            int last = spec->causal ? position + num : seq_len;
            int from = seen / SPLIT, to = (last + SPLIT - 1) / SPLIT;
            int pieces = is_cut && to - from > 1 ? to - from : 1;
            work += (int64_t)(last - seen) * num * spec->num_heads * (spec->head_dim + spec->value_dim);
            if (num_items + (int64_t)pieces * spec->num_kv_heads > capacity) return 0;
            for (int h = 0; h < spec->num_kv_heads; ++h) {
                int64_t first_part = parts;
                for (int n = 0; n < pieces; ++n) {
                    Item item = {s, h, first, num, from, to, -1, 0};
                    if (pieces > 1) {
                        item.first_split = from + n;
                        item.end_split = from + n + 1;
                        item.part = (int32_t)parts++;
                        item.first_part = (int32_t)first_part;
                    }
                    items[num_items++] = item;
                }
                if (pieces > 1) num_parts[first_part] = pieces;
            }
        }
    }
    found[0] = num_items;
    found[1] = parts;
    found[2] = work < WORTH_THREADS || num_items < 2 ? 1 : spec->num_threads;
    return 1;
}

void quire_attend(const Spec *spec, const Step *step, const AttendCall *call) {
    AttendJob job = {spec, step, call, 0, 0};
    in_parallel(attend_items, &job, step->num_threads);
}

void quire_write(const Spec *spec, const WriteCall *call) {
    int64_t heads = spec->num_kv_heads + (call->q == nullptr ? 0 : spec->num_heads);
    RowsJob job = {table_of(spec->isa), spec, call, call->num_tokens, 0, 0, spec->dtype, 0};
    run_rows(job, heads * spec->head_dim, spec->num_threads);
}

void quire_norm(int isa, int dtype, const RowsCall *call, int num_threads) {
    RowsJob job = {table_of(isa), nullptr, call, call->num_rows, 0, 0, dtype, 1};
    run_rows(job, call->size, num_threads);
}

void quire_silu_mul(int isa, int dtype, const RowsCall *call, int num_threads) {
    RowsJob job = {table_of(isa), nullptr, call, call->num_rows, 0, 0, dtype, 2};
    run_rows(job, call->size, num_threads);
}

void quire_quantize(int isa, int dtype, const RowsCall *call, int num_threads) {
    RowsJob job = {table_of(isa), nullptr, call, call->num_rows, 0, 0, dtype, 3};
    run_rows(job, call->size, num_threads);
}

void quire_int8(int isa, int dtype, const Int8Call *call, int num_threads) {
    RowsJob rows = {table_of(isa), nullptr, call, call->num_rows, 0, 0, dtype, 4};
    run_rows(rows, call->inputs, num_threads);
    RowsJob tiles = {table_of(isa), nullptr, call, (call->outputs + 15) / 16, 0, 0, dtype, 5};
    run_outputs(tiles, 4, call->num_rows * call->inputs * call->outputs / 4, num_threads);
}

// Floats of a row of `wide`.
int64_t quire_packed_width(int isa, const PackedCall *call) { return table_of(isa)->packed_width(call); }

void quire_packed(int isa, int dtype, const PackedCall *call, int num_threads) {
    RowsJob rows = {table_of(isa), nullptr, call, call->num_rows, 0, 0, dtype, 6};
    run_rows(rows, call->inputs, num_threads);
    RowsJob outputs = {table_of(isa), nullptr, call, call->outputs, 0, 0, dtype, 7};
    run_outputs(outputs, 4, call->num_rows * call->inputs * call->outputs, num_threads);
}

void quire_widen(int isa, int dtype, const PackedCall *call, int num_threads) {
    RowsJob outputs = {table_of(isa), nullptr, call, call->outputs, 0, 0, dtype, 8};
    run_outputs(outputs, 1, call->inputs * call->outputs, num_threads);
}
}
