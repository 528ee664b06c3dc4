// The table of one instruction set: the including file says its NAME and the TABLE's function.
#include "attend.h"
#include "int8.h"
#include "packed.h"
#include "rows.h"

namespace {

template <class E>
void attend_one(const Spec *spec, const Step *step, const AttendCall *call, const Item *item, float *room) {
    Work<E>(*spec, *step, *call, *item, room).run();
}

#define BY_DTYPE(dtype, function, ...)                             \
    switch (dtype) {                                               \
        case FLOAT32: return function<Float32>(__VA_ARGS__);       \
        case BFLOAT16: return function<BFloat16>(__VA_ARGS__);     \
        default: return function<Float16>(__VA_ARGS__);            \
    }

int64_t scratch_size(const Spec *spec) { BY_DTYPE(spec->dtype, scratch_of, *spec) }
int64_t part_size(const Spec *spec) { BY_DTYPE(spec->dtype, part_of, *spec) }
void attend(const Spec *spec, const Step *step, const AttendCall *call, const Item *item, float *room) {
    BY_DTYPE(spec->dtype, attend_one, spec, step, call, item, room)
}
void write(const Spec *spec, const WriteCall *call, int64_t first, int64_t end) {
    BY_DTYPE(spec->dtype, write_tokens, *spec, *call, first, end)
}
void norm(int32_t dtype, const RowsCall *call, int64_t first, int64_t end) {
    BY_DTYPE(dtype, norm_rows, *call, first, end)
}
void silu_mul(int32_t dtype, const RowsCall *call, int64_t first, int64_t end) {
    BY_DTYPE(dtype, silu_mul_rows, *call, first, end)
}
void quantize(int32_t dtype, const RowsCall *call, int64_t first, int64_t end) {
    BY_DTYPE(dtype, quantize_rows, *call, first, end)
}

void round_rows(int32_t dtype, const Int8Call *call, int64_t first, int64_t end) {
    BY_DTYPE(dtype, int8_rows, *call, first, end)
}
void multiply_tiles(int32_t dtype, const Int8Call *call, int64_t first, int64_t end) {
    BY_DTYPE(dtype, int8_tiles, *call, first, end)
}
int64_t packed_width(const PackedCall *call) { return packed_blocks(*call) * LANES * (32 / call->bits); }
void arrange(int32_t dtype, const PackedCall *call, int64_t first, int64_t end) {
    BY_DTYPE(dtype, arrange_rows, *call, first, end)
}
void multiply_packed(int32_t dtype, const PackedCall *call, int64_t first, int64_t end) {
    BY_DTYPE(dtype, packed_outputs, *call, first, end)
}
void widen(int32_t dtype, const PackedCall *call, int64_t first, int64_t end) {
    BY_DTYPE(dtype, widen_outputs, *call, first, end)
}

const Kernels TABLE_OF_THIS_FILE = {
    NAME,     scratch_size, part_size,      attend,       write,   norm,            silu_mul,
    quantize, round_rows,   multiply_tiles, packed_width, arrange, multiply_packed, widen,
};

}  // namespace

extern "C" const Kernels *TABLE() { return &TABLE_OF_THIS_FILE; }
