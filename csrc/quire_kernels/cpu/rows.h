// What is done token by token: keys and values into their slots, norms, rotation, activations.
#pragma once

#include "vectors.h"

namespace {

enum { MOST_DIMS = 1024 };  // of a head

template <class E>
void widen_row(const typename E::T *from, float *to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = E::to_float(from[i]);
}

inline float sum_of_squares(const float *x, int64_t count) {
    vf sums[2] = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= count; i += 2 * LANES) {
        vf a = load(x + i), b = load(x + i + LANES);
        sums[0] += a * a;
        sums[1] += b * b;
    }
    float total = sum_of(sums[0] + sums[1]);
    for (; i < count; ++i) total += x[i] * x[i];
    return total;
}

template <class E>
void norm_head(float *x, const typename E::T *weight, int size, float eps) {
    float scale = 1 / sqrtf(sum_of_squares(x, size) / size + eps);
    for (int i = 0; i < size; ++i) x[i] = x[i] * scale * E::to_float(weight[i]);
}

// Cosines and sines are rounded to the dtype first, as models are trained.
template <class E>
void rotate_head(float *x, const float *cos, const float *sin, int half) {
    for (int i = 0; i < half; ++i) {
        float a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i];
        x[i + half] = b * cos[i] + a * sin[i];
    }
}

template <class E>
void put_key(const typename E::T *key, const Spec &spec, uint8_t *head, int offset) {
    uint32_t *words = (uint32_t *)head + offset;
    int whole = spec.head_dim / E::PAIR;
    for (int w = 0; w < whole; ++w) memcpy(words + (int64_t)w * spec.block_size, key + w * E::PAIR, 4);
    if (spec.head_dim % E::PAIR) words[(int64_t)whole * spec.block_size] = (uint32_t)key[spec.head_dim - 1];
}
template <>
void put_key<Float32>(const float *key, const Spec &spec, uint8_t *head, int offset) {
    float *words = (float *)head + offset;
    for (int w = 0; w < spec.head_dim; ++w) words[(int64_t)w * spec.block_size] = key[w];
}

template <class E>
void write_tokens(const Spec &spec, const WriteCall &call, int64_t first, int64_t end) {
    typedef typename E::T T;
    Sizes<E> size(spec);
    int dim = spec.head_dim, half = (int)call.rotary_half;
    float wide[MOST_DIMS], cos[MOST_DIMS], sin[MOST_DIMS];
    T narrow[MOST_DIMS];
    for (int64_t token = first; token < end; ++token) {
        int slot = call.slots[token], offset = slot % spec.block_size;
        uint8_t *block = call.cache + slot / spec.block_size * call.block_bytes;
        for (int i = 0; i < half; ++i) {
            cos[i] = E::to_float(E::from_float(call.cos[(int64_t)call.positions[token] * half + i]));
            sin[i] = E::to_float(E::from_float(call.sin[(int64_t)call.positions[token] * half + i]));
        }
        for (int h = 0; call.q != nullptr && h < spec.num_heads; ++h) {
            widen_row<E>((const T *)call.q + token * call.q_token + h * dim, wide, dim);
            if (call.q_norm != nullptr) norm_head<E>(wide, (const T *)call.q_norm, dim, call.eps);
            rotate_head<E>(wide, cos, sin, half);
            T *out = (T *)call.q_out + (token * spec.num_heads + h) * dim;
            for (int i = 0; i < dim; ++i) out[i] = E::from_float(wide[i]);
        }
        for (int h = 0; h < spec.num_kv_heads; ++h) {
            uint8_t *head = block + h * size.head_bytes;
            const T *key = (const T *)call.k + token * call.k_token + h * call.k_head;
            if (call.q != nullptr) {
                widen_row<E>(key, wide, dim);
                if (call.k_norm != nullptr) norm_head<E>(wide, (const T *)call.k_norm, dim, call.eps);
                rotate_head<E>(wide, cos, sin, half);
                for (int i = 0; i < dim; ++i) narrow[i] = E::from_float(wide[i]);
                key = narrow;
            }
            put_key<E>(key, spec, head, offset);
            memcpy(head + size.key_bytes + offset * size.value_row,
                   (const T *)call.v + token * call.v_token + h * call.v_head, size.value_row);
        }
    }
}

// out = rms_norm(x + residual) * weight; the sum, rounded, stays in x.
template <class E>
void norm_rows(const RowsCall &call, int64_t first, int64_t end) {
    typedef typename E::T T;
    const T *weight = (const T *)call.weight;
    int64_t size = call.size;
    for (int64_t row = first; row < end; ++row) {
        T *x = (T *)call.x + row * size, *out = (T *)call.out + row * size;
        if (call.residual != nullptr) {
            const T *added = (const T *)call.residual + row * size;
            for (int64_t i = 0; i < size; ++i)
                x[i] = E::from_float(E::to_float(x[i]) + E::to_float(added[i]));
        }
        vf squares = {};
        float piece[LANES], rest = 0;
        int64_t i = 0;
        for (; i + LANES <= size; i += LANES) {
            for (int n = 0; n < LANES; ++n) piece[n] = E::to_float(x[i + n]);
            squares += load(piece) * load(piece);
        }
        for (; i < size; ++i) rest += E::to_float(x[i]) * E::to_float(x[i]);
        float scale = 1 / sqrtf((sum_of(squares) + rest) / size + call.eps);
        // Rounded before the weight, as the PyTorch body and Transformers do.
        for (i = 0; i < size; ++i) {
            float normed = E::to_float(E::from_float(E::to_float(x[i]) * scale));
            out[i] = E::from_float(normed * E::to_float(weight[i]));
        }
    }
}

// out = silu(gate) * up of rows of 2 * size, gate rounded first, as the PyTorch body does.
template <class E>
void silu_mul_rows(const RowsCall &call, int64_t first, int64_t end) {
    typedef typename E::T T;
    for (int64_t row = first; row < end; ++row) {
        const T *gate = (const T *)call.x + row * 2 * call.size, *up = gate + call.size;
        T *out = (T *)call.out + row * call.size;
        float piece[LANES];
        for (int64_t i = 0; i < call.size; i += LANES) {
            int count = call.size - i < LANES ? (int)(call.size - i) : (int)LANES;
            if (count < LANES) memset(piece, 0, sizeof piece);
            for (int n = 0; n < count; ++n) piece[n] = E::to_float(gate[i + n]);
            vf x = load(piece);
            vf most = x < splat(-87.0f) ? splat(-87.0f) : x;
            store(piece, x / (1.0f + exp_of(-most)));
            for (int n = 0; n < count; ++n)
                out[i + n] = E::from_float(E::to_float(E::from_float(piece[n])) * E::to_float(up[i + n]));
        }
    }
}

// out = round(x / scale) + 128 in 8 bits, scale = max |x| / 127 of each row: NaN where a number of
// the row is not finite, so that products show it.
template <class E>
void quantize_rows(const RowsCall &call, int64_t first, int64_t end) {
    const int PIECE = 4 * LANES;
    float piece[PIECE];
    for (int64_t row = first; row < end; ++row) {
        const typename E::T *x = (const typename E::T *)call.x + row * call.size;
        uint8_t *out = (uint8_t *)call.out + row * call.size;
        // Without signs the bits of floats are in the order of the floats, NaN above infinity.
        int32_t most = 0;
        for (int64_t i = 0; i < call.size; i += PIECE) {
            int count = call.size - i < PIECE ? (int)(call.size - i) : PIECE;
            widen_row<E>(x + i, piece, count);
            for (int n = 0; n < count; ++n) {
                int32_t bits;
                memcpy(&bits, piece + n, 4);
                bits &= 0x7fffffff;
                most = bits > most ? bits : most;
            }
        }
        float largest;
        memcpy(&largest, &most, 4);
        bool is_finite = most < 0x7f800000;
        float scale = most == 0 || !is_finite ? 1.0f : largest / 127.0f;
        if (scale == 0) scale = 1.0f;
        for (int64_t i = 0; i < call.size && is_finite; i += PIECE) {
            int count = call.size - i < PIECE ? (int)(call.size - i) : PIECE;
            widen_row<E>(x + i, piece, count);
            for (int n = 0; n < count; ++n) {
                float value = rintf(piece[n] / scale);
                value = value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value;
                out[i + n] = (uint8_t)((int32_t)value + 128);
            }
        }
        if (!is_finite) memset(out, 128, call.size);
        call.scales[row] = is_finite ? scale : NAN;
    }
}

}  // namespace
