// Attention of some queries of one KV head over paged keys, chunk by chunk with a running softmax.
#pragma once

#include "vectors.h"

namespace {

// Room for one item: rows of packed queries, scores, sums of a split and of all before it.
template <class E>
struct Scratch {
    float *q, *scores, *sums, *total, *best, *weight, *total_best, *total_weight, *shrink;
    uint32_t *packed;  // keys of a chunk whose blocks are shorter than a vector
    uint8_t *tails;    // last words of a chunk's value rows, filled up with zeros
    Scratch(const Spec &spec, float *room) {
        Sizes<E> size(spec);
        float *at = room;
        q = take(at, size.rows * size.key_words * E::PAIR);
        scores = take(at, size.rows * CHUNK);
        sums = take(at, size.rows * size.padded_value);
        total = take(at, size.rows * size.padded_value);
        best = take(at, size.rows);
        weight = take(at, size.rows);
        total_best = take(at, size.rows);
        total_weight = take(at, size.rows);
        shrink = take(at, size.rows);
        packed = (uint32_t *)take(at, size.key_words * CHUNK);
        tails = (uint8_t *)take(at, LANES * CHUNK);
        num_floats = at - room;
    }
    int64_t num_floats;

  private:
    static float *take(float *&at, int64_t count) {
        float *own = at;
        at += (count + 15) / 16 * 16;
        return own;
    }
};

// Keys of one chunk: a pointer to the first word of each vector of tokens, and words to the next.
struct Keys {
    const uint32_t *vectors[CHUNK / LANES];
    int stride;
};

#if defined(__AVX512BF16__)
enum { HAS_BF16_PRODUCTS = 1 };
inline vf add_products(vf sum, vu keys, uint32_t query) {
    __m512bh a = (__m512bh)(__m512i)keys, b = (__m512bh)_mm512_set1_epi32((int)query);
    return (vf)_mm512_dpbf16_ps((__m512)sum, a, b);
}
#else
enum { HAS_BF16_PRODUCTS = 0 };
inline vf add_products(vf sum, vu, uint32_t) { return sum; }
#endif

// scores[r][n] = q[r] . keys of vector n, for R rows and N vectors of tokens.
template <class E, int R, int N>
void score(const float *q, int q_row, const uint32_t *const *k, int stride, int words, float *out) {
    vf sums[R][N] = {};
    for (int w = 0; w < words; ++w) {
        for (int n = 0; n < N; ++n) {
            vu keys = load_words(k[n] + (int64_t)w * stride);
            if (E::IS_BF16 && HAS_BF16_PRODUCTS) {
                for (int r = 0; r < R; ++r)
                    sums[r][n] = add_products(sums[r][n], keys, ((const uint32_t *)q)[r * q_row + w]);
            } else {
                vf wide[E::PAIR];
                E::widen(keys, wide);
                for (int i = 0; i < E::PAIR; ++i)
                    for (int r = 0; r < R; ++r) sums[r][n] += wide[i] * q[r * q_row + w * E::PAIR + i];
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) store(out + r * CHUNK + n * LANES, sums[r][n]);
}

template <class E, int R>
void score_rows(const float *q, int q_row, const Keys &keys, int begin, int end, int words, float *out) {
    const int most = R == 8 ? 2 : LANES == 16 ? 4 : 2;
    int n = begin;
    for (; n + most <= end; n += most)
        score<E, R, most>(q, q_row, keys.vectors + n, keys.stride, words, out + n * LANES);
    for (; n < end; ++n) score<E, R, 1>(q, q_row, keys.vectors + n, keys.stride, words, out + n * LANES);
}

// sums[r] = sums[r] * shrink[r] + weights of R rows times values, in N tiles of LANES words.
template <class E, int R, int N>
void weigh(const float *weights, const uint8_t *const *values, int64_t offset, int begin, int end,
           const float *shrink, float *sums, int sums_row) {
    vf own[R][N * E::PAIR] = {};
    for (int t = begin; t < end; ++t) {
        for (int n = 0; n < N; ++n) {
            vf wide[E::PAIR];
            E::widen(load_words(values[t] + offset + n * LANES * 4), wide);
            for (int i = 0; i < E::PAIR; ++i)
                for (int r = 0; r < R; ++r) own[r][n * E::PAIR + i] += wide[i] * weights[r * CHUNK + t];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < N * E::PAIR; ++i) {
            float *place = sums + r * sums_row + i * LANES;
            store(place, shrink == nullptr ? own[r][i] : load(place) * shrink[r] + own[r][i]);
        }
}

// What is seen of a chunk: pointers to value rows, whole and tails.
struct Values {
    const uint8_t *rows[CHUNK], *tails[CHUNK];
};

template <class E, int R>
void weigh_rows(const Sizes<E> &size, const float *weights, const Values &values, int begin, int end,
                const float *shrink, float *sums) {
    const int step = LANES * E::PAIR;
    int whole = (int)(size.value_row / (LANES * 4)), tile = 0;
    for (; R <= 4 && tile + 2 <= whole; tile += 2)
        weigh<E, R, 2>(weights, values.rows, (int64_t)tile * LANES * 4, begin, end, shrink,
                       sums + tile * step, size.padded_value);
    for (; tile < whole; ++tile)
        weigh<E, R, 1>(weights, values.rows, (int64_t)tile * LANES * 4, begin, end, shrink,
                       sums + tile * step, size.padded_value);
    if (tile < size.value_tiles)
        weigh<E, R, 1>(weights, values.tails, 0, begin, end, shrink, sums + tile * step,
                       size.padded_value);
}

// One item at work.
template <class E>
struct Work {
    typedef typename E::T T;
    const Spec &spec;
    const Step &step;
    const AttendCall &call;
    const Item &item;
    Sizes<E> size;
    Scratch<E> room;
    int rows, seq_len, first_token, first_position;
    const int32_t *blocks;

    Work(const Spec &s, const Step &t, const AttendCall &c, const Item &i, float *scratch)
        : spec(s), step(t), call(c), item(i), size(s), room(s, scratch) {
        rows = item.num_queries * size.group;
        seq_len = step.seq_lens[item.sequence];
        int start = step.starts[item.sequence], count = step.starts[item.sequence + 1] - start;
        first_token = start + item.first_query;
        first_position = seq_len - count + item.first_query;
        blocks = step.block_table + item.sequence * step.table_stride;
    }

    int position_of(int row) const { return first_position + row / size.group; }
    int head_of(int row) const { return item.kv_head * size.group + row % size.group; }
    int first_seen(int position) const {
        return spec.window > 0 && position >= spec.window ? position - spec.window + 1 : 0;
    }
    int end_seen(int position) const { return spec.causal ? position + 1 : seq_len; }
    const uint8_t *block_of(int token) const {
        return call.cache + blocks[token / spec.block_size] * call.block_bytes +
               item.kv_head * size.head_bytes;
    }

    void pack_queries() {
        bool as_pairs = E::IS_BF16 && HAS_BF16_PRODUCTS;
        int width = size.key_words * E::PAIR;
        for (int r = 0; r < rows; ++r) {
            const T *q = (const T *)call.q + (first_token + r / size.group) * call.q_token +
                         head_of(r) * call.q_head;
            if (as_pairs) {
                T *own = (T *)((uint32_t *)room.q + (int64_t)r * size.key_words);
                memcpy(own, q, spec.head_dim * sizeof(T));
                if (spec.head_dim < width) own[spec.head_dim] = 0;
                continue;
            }
            float *own = room.q + (int64_t)r * width;
            for (int d = 0; d < spec.head_dim; ++d) own[d] = E::to_float(q[d]);
            if (spec.head_dim < width) own[spec.head_dim] = 0;
        }
    }

    // Return pointers to the chunk's vectors begin .. end that hold tokens of first .. last.
    Keys keys_of(int chunk, int begin, int end, int first, int last) {
        Keys keys;
        keys.stride = spec.block_size % LANES == 0 ? spec.block_size : CHUNK;
        for (int n = begin; n < end; ++n) {
            int token = chunk + n * LANES;
            if (spec.block_size % LANES == 0) {
                keys.vectors[n] = (const uint32_t *)block_of(token) + token % spec.block_size;
                continue;
            }
            for (int i = 0; i < LANES; ++i) {
                int own = token + i;
                bool is_seen = own >= first && own < last;
                const uint32_t *from =
                    is_seen ? (const uint32_t *)block_of(own) + own % spec.block_size : nullptr;
                uint32_t *to = room.packed + n * LANES + i;
                for (int w = 0; w < size.key_words; ++w)
                    to[w * CHUNK] = is_seen ? from[w * spec.block_size] : 0;
            }
            keys.vectors[n] = room.packed + n * LANES;
        }
        return keys;
    }

    void values_of(int chunk, int begin, int end, Values *values) {
        int64_t whole = size.value_row / (LANES * 4) * (LANES * 4);
        for (int t = begin; t < end;) {
            int offset = (chunk + t) % spec.block_size, left = spec.block_size - offset;
            const uint8_t *row = block_of(chunk + t) + size.key_bytes + offset * size.value_row;
            for (; left > 0 && t < end; --left, ++t, row += size.value_row) values->rows[t] = row;
        }
        if (whole == size.value_row) return;
        for (int t = begin; t < end; ++t) {
            uint8_t *tail = room.tails + t * LANES * 4;
            memset(tail, 0, LANES * 4);
            memcpy(tail, values->rows[t] + whole, size.value_row - whole);
            values->tails[t] = tail;
        }
    }

    // Turn a row's scores into weights; add to its sum and note by what older sums shrink.
    void soften(int row, int chunk, int begin, int end, bool is_first) {
        int position = position_of(row), first = first_seen(position), last = end_seen(position);
        float slope = call.alibi_slopes == nullptr ? 0 : call.alibi_slopes[head_of(row)];
        float *scores = room.scores + row * CHUNK;
        vf best = splat(-INFINITY);
        for (int n = begin; n < end; ++n) {
            vf x = load(scores + n * LANES) * spec.scale;
            vi token = first_lanes() + (chunk + n * LANES);
            if (spec.softcap > 0) x = tanh_of(x / spec.softcap) * spec.softcap;
            if (call.alibi_slopes != nullptr)
                x = x - slope * __builtin_convertvector(position - token, vf);
            x = ((token >= first) & (token < last)) ? x : splat(-INFINITY);
            store(scores + n * LANES, x);
            best = x > best ? x : best;
        }
        float older = is_first ? -INFINITY : room.best[row], newer = max_of(best);
        newer = newer > older ? newer : older;
        float base = newer == -INFINITY ? 0 : newer;
        vf sum = {};
        for (int n = begin; n < end; ++n) {
            vf x = exp_of(load(scores + n * LANES) - base);
            store(scores + n * LANES, x);
            sum += x;
        }
        float shrink = older == newer ? 1 : exp_of(older - base);
        room.shrink[row] = shrink;
        room.weight[row] = (is_first ? 0 : room.weight[row] * shrink) + sum_of(sum);
        room.best[row] = newer;
    }

    template <int R>
    void chunk_rows(int &row, const Keys &keys, int begin, int end) {
        int width = size.key_words * (E::IS_BF16 && HAS_BF16_PRODUCTS ? 1 : E::PAIR);
        for (; row + R <= rows; row += R)
            score_rows<E, R>(room.q + (int64_t)row * width, width, keys, begin, end, size.key_words,
                             room.scores + row * CHUNK);
    }

    template <int R>
    void sum_rows(int &row, const Values &values, int begin, int end, bool is_first) {
        for (; row + R <= rows; row += R)
            weigh_rows<E, R>(size, room.scores + row * CHUNK, values, begin, end,
                             is_first ? nullptr : room.shrink + row,
                             room.sums + (int64_t)row * size.padded_value);
    }

    void attend_chunk(int chunk, int first, int last, bool is_first) {
        int from = first > chunk ? first - chunk : 0;
        int to = last < chunk + CHUNK ? last - chunk : CHUNK;
        int begin = from / LANES, end = ceil_div(to, LANES), row = 0;
        Keys keys = keys_of(chunk, begin, end, first, last);
        if (MOST_ROWS == 8) chunk_rows<MOST_ROWS>(row, keys, begin, end);
        chunk_rows<4>(row, keys, begin, end);
        chunk_rows<2>(row, keys, begin, end);
        chunk_rows<1>(row, keys, begin, end);
        for (int r = 0; r < rows; ++r) soften(r, chunk, begin, end, is_first);
        Values values;
        values_of(chunk, from, to, &values);
        row = 0;
        if (MOST_ROWS == 8) sum_rows<MOST_ROWS>(row, values, from, to, is_first);
        sum_rows<4>(row, values, from, to, is_first);
        sum_rows<2>(row, values, from, to, is_first);
        sum_rows<1>(row, values, from, to, is_first);
    }

    // Attend the keys of one split; its sums lie in `room` then.
    void attend_split(int split) {
        int first = first_seen(first_position), last = end_seen(position_of(rows - 1));
        first = first > split * SPLIT ? first : split * SPLIT;
        last = last < (split + 1) * SPLIT ? last : (split + 1) * SPLIT;
        int begin = first / CHUNK * CHUNK;
        for (int chunk = begin; chunk < last; chunk += CHUNK)
            attend_chunk(chunk, first, last, chunk == begin);
    }

    // Add a split's sums to those of the splits before it.
    void merge(const float *sums, const float *best, const float *weight, bool is_first) {
        for (int r = 0; r < rows; ++r) {
            float older = is_first ? -INFINITY : room.total_best[r];
            float newer = best[r] > older ? best[r] : older;
            float base = newer == -INFINITY ? 0 : newer;
            float before = is_first ? 0 : exp_of(older - base), now = exp_of(best[r] - base);
            const float *from = sums + (int64_t)r * size.padded_value;
            float *to = room.total + (int64_t)r * size.padded_value;
            for (int i = 0; i < size.padded_value; i += LANES) {
                vf own = load(from + i) * now;
                store(to + i, is_first ? own : load(to + i) * before + own);
            }
            room.total_weight[r] = (is_first ? 0 : room.total_weight[r] * before) + weight[r] * now;
            room.total_best[r] = newer;
        }
    }

    void finish() {
        for (int r = 0; r < rows; ++r) {
            int head = head_of(r), token = first_token + r / size.group;
            float best = room.total_best[r], weight = room.total_weight[r], scale = 1;
            if (call.sinks != nullptr) {
                float newer = call.sinks[head] > best ? call.sinks[head] : best;
                scale = exp_of(best - newer);
                weight = weight * scale + exp_of(call.sinks[head] - newer);
                best = newer;
            }
            int64_t place = (int64_t)token * spec.num_heads + head;
            if (call.lse != nullptr) call.lse[place] = best + logf(weight);
            scale = weight == 0 ? 0 : scale / weight;
            T *out = (T *)call.out + place * spec.value_dim;
            const float *sums = room.total + (int64_t)r * size.padded_value;
            for (int tile = 0; tile < size.value_tiles; ++tile)
                put_tile(sums + tile * LANES * E::PAIR, scale, tile * LANES * E::PAIR, out);
        }
    }

    // Put a tile's planes, one for each element of a word, side by side again.
    void put_tile(const float *planes, float scale, int first, T *out) {
        T own[LANES * E::PAIR];
        for (int i = 0; i < LANES; ++i)
            for (int n = 0; n < E::PAIR; ++n)
                own[i * E::PAIR + n] = E::from_float(planes[n * LANES + i] * scale);
        int left = spec.value_dim - first;
        if (left >= LANES * E::PAIR)
            memcpy(out + first, own, sizeof own);
        else
            memcpy(out + first, own, left * sizeof(T));
    }

    void run() {
        pack_queries();
        if (item.part < 0) {
            for (int split = item.first_split; split < item.end_split; ++split) {
                attend_split(split);
                merge(room.sums, room.best, room.weight, split == item.first_split);
            }
            finish();
            return;
        }
        attend_split(item.first_split);
        int64_t num_sums = (int64_t)rows * size.padded_value;
        float *part = step.parts + item.part * step.part_size;
        memcpy(part, room.sums, num_sums * 4);
        memcpy(part + num_sums, room.best, rows * 4);
        memcpy(part + num_sums + rows, room.weight, rows * 4);
        int32_t *finished = step.finished + item.first_part, count = step.num_parts[item.first_part];
        if (__atomic_add_fetch(finished, 1, __ATOMIC_ACQ_REL) < count) return;
        *finished = 0;
        for (int n = 0; n < count; ++n) {
            const float *own = step.parts + (item.first_part + n) * step.part_size;
            merge(own, own + num_sums, own + num_sums + rows, n == 0);
        }
        finish();
    }
};

template <class E>
int64_t scratch_of(const Spec &spec) {
    return Scratch<E>(spec, nullptr).num_floats;
}

template <class E>
int64_t part_of(const Spec &spec) {
    Sizes<E> size(spec);
    return ((int64_t)size.rows * (size.padded_value + 2) + 15) / 16 * 16;
}

}  // namespace
