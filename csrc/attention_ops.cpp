// Attention on whole steps, and the cache that it reads.
#include <algorithm>

#include "bytes.h"
#include "ops.h"

namespace moebius {

void Ops::rotate_and_store(const RotateAndStore& r, int rows) {
    const CacheShape& shape = *r.shape;
    const size_t size = size_of(r.dtype), key_bytes = shape.key_dim * size, value_bytes = shape.value_dim * size;
    const size_t q_bytes = r.q_heads * key_bytes, head_bytes = r.gated ? 2 * key_bytes : key_bytes;
    const size_t queries_bytes = r.q_heads * head_bytes, stored = r.queries_alone ? 0 : shape.kv_heads;
    const size_t row_bytes = queries_bytes + stored * (key_bytes + (r.keys_as_values ? 0 : value_bytes));
    const auto rotate_query = kernels_->rotate[r.dtype][r.q_norm.dtype], rotate_key = kernels_->rotate[r.dtype][r.k_norm.dtype];
    const auto rotate_key_wide = kernels_->rotate_wide[r.dtype][r.k_norm.dtype];
    const auto norm_value = kernels_->rotate[r.dtype][F32];
    const int group = r.q_heads / shape.kv_heads, half = r.turned_first ? 0 : r.half;
    // Two neighbouring tokens may share a group of the cache: a head's tokens of one step are written by one thread.
    const int items = rows <= 4 ? 1 : shape.kv_heads, heads = shape.kv_heads / items;
    const bool coded = shape.type == INT8_CACHE;
    pool_.run(items, [&](int item, int thread) {
        const size_t codes = coded ? size_t(shape.key_dim) + shape.value_dim : 0;
        float *rotated = scratch_[thread].need(2 * shape.key_dim + codes + (r.normed_values ? 2 * shape.value_dim : 0));
        float *turned = rotated + shape.key_dim + codes, *ones = turned + shape.key_dim, *normed = ones + shape.value_dim;
        if (r.normed_values) std::fill_n(ones, shape.value_dim, 1.0f);
        int8_t *k_codes = reinterpret_cast<int8_t*>(rotated + shape.key_dim), *v_codes = k_codes + shape.key_dim;
        for (int t = 0; t < rows; t++) {
            const float *cos = r.cos + size_t(t) * r.half, *sin = r.sin + size_t(t) * r.half;
            // A head as the kernels have it that norm it and turn what is not turned yet.
            const auto head = [&](const void* x) -> const void* {
                if (!r.turned_first) return x;
                kernels_->rotate[r.dtype][r.dtype](x, nullptr, 0, cos, sin, r.half, r.interleaved, shape.key_dim, turned);
                return turned;
            };
            const char *row = at(r.qkv, t * row_bytes), *keys = row + queries_bytes, *values = r.keys_as_values ? keys : keys + shape.kv_heads * key_bytes;
            for (int h = item * heads; h < (item + 1) * heads; h++) {
                for (int i = h * group; i < (h + 1) * group; i++)
                    rotate_query(head(row + i * head_bytes), r.q_norm.values, r.eps, cos, sin, half, r.interleaved, shape.key_dim,
                                 at(r.q_out, t * q_bytes + i * key_bytes));
                if (r.queries_alone) continue;
                const void *key = keys + h * key_bytes, *value = values + h * value_bytes;
                if (r.normed_values) {
                    norm_value(value, ones, r.eps, cos, sin, 0, false, shape.value_dim, normed);
                    value = normed;
                }
                if (coded) {
                    rotate_key_wide(head(key), r.k_norm.values, r.eps, cos, sin, half, r.interleaved, shape.key_dim, rotated);
                    const float* less = r.key_offset ? r.key_offset + size_t(h) * shape.key_dim : nullptr;
                    const Codes k{k_codes, kernels_->quantise[F32](rotated, less, shape.key_dim, k_codes)};
                    const Codes v{v_codes, kernels_->quantise[r.dtype](value, nullptr, shape.value_dim, v_codes)};
                    write_codes(shape, r.cache, k, v, r.slots[t], h);
                    continue;
                }
                rotate_key(head(key), r.k_norm.values, r.eps, cos, sin, half, r.interleaved, shape.key_dim, rotated);
                write_kv(r.dtype, shape, r.cache, rotated, value, r.slots[t], h);
            }
        }
    });
}

// The groups of a slot's (block, kv head).
static uint32_t* groups_of(const CacheShape& shape, uint32_t* cache, int64_t slot, int head) {
    return cache + shape.head_at(slot / shape.block_size, head) / sizeof(uint32_t);
}

void write_key(Dtype dtype, const CacheShape& shape, uint32_t* cache, const void* k, int64_t slot, int head) {
    const int offset = int(slot % shape.block_size), n = shape.key_dim;
    uint32_t* keys = groups_of(shape, cache, slot, head);
    if (dtype == F32) {
        for (int i = 0; i < n; i++) keys[size_t(i) * shape.block_size + offset] = static_cast<const uint32_t*>(k)[i];
        return;
    }
    const uint16_t* k16 = static_cast<const uint16_t*>(k);
    for (int i = 0; i < n; i += 2)
        keys[size_t(i / 2) * shape.block_size + offset] = k16[i] | uint32_t(i + 1 < n ? k16[i + 1] : 0) << 16;
}

void write_kv(Dtype dtype, const CacheShape& shape, uint32_t* cache, const void* k, const void* v, int64_t slot, int head) {
    write_key(dtype, shape, cache, k, slot, head);
    const int offset = int(slot % shape.block_size), g = shape.per_group;
    uint32_t* values = groups_of(shape, cache, slot, head) + shape.k_groups + size_t(offset / g) * shape.padded_dim;
    if (dtype == F32) {
        std::copy_n(static_cast<const uint32_t*>(v), shape.value_dim, values);
        return;
    }
    const uint16_t* v16 = static_cast<const uint16_t*>(v);
    uint16_t* to = reinterpret_cast<uint16_t*>(values) + offset % 2;
    for (int i = 0; i < shape.value_dim; i++) to[2 * i] = v16[i];
}

void write_codes(const CacheShape& shape, void* cache, const Codes& k, const Codes& v, int64_t slot, int head) {
    const int64_t block = slot / shape.block_size;
    const int offset = int(slot % shape.block_size), n = shape.key_dim;
    int8_t* keys = static_cast<int8_t*>(cache) + shape.head_at(block, head);
    int8_t* values = keys + 2 * shape.k_groups;
    uint16_t* scales = reinterpret_cast<uint16_t*>(values + 2 * shape.v_groups);
    int8_t* to = keys + 2 * offset;
    for (int i = 0; i < n; i += 2, to += 2 * shape.block_size) to[0] = k.codes[i], to[1] = i + 1 < n ? k.codes[i + 1] : 0;
    to = values + size_t(offset / 2) * 2 * shape.padded_dim + offset % 2;
    for (int i = 0; i < shape.value_dim; i++) to[2 * i] = v.codes[i];
    scales[offset] = k.scale, scales[shape.block_size + offset] = v.scale;
}

// Items of work: some consecutive queries of one sequence with (a part of) the query heads that share a kv head. Long ones
// first would balance better, but sequences come in the scheduler's order and the queue evens them out.
void Ops::plan_attention(const Attention& a) {
    const StepAttention& step = *a.step;
    const int share = a.q_heads / a.shape->kv_heads;  // query heads of a kv head
    const int heads = heads_together(a, share), parts = (share + heads - 1) / heads, queries = std::max(1, ROW_BLOCK / heads);
    attends_.clear();
    for (int sequence = 0; sequence < int(step.seq_lens.size()); sequence++)
        for (int first = step.query_start[sequence]; first < step.query_start[sequence + 1]; first += queries) {
            const int count = std::min(queries, step.query_start[sequence + 1] - first);
            for (int kv_head = 0; kv_head < a.shape->kv_heads; kv_head++)
                for (int part = 0; part < parts; part++) {
                    const int head = kv_head * share + part * heads;
                    attends_.push_back({sequence, first, count, kv_head, head, std::min(heads, (kv_head + 1) * share - head), 0});
                }
        }
}

// Query heads of an item. All that a block of rows has room for read each key once; where these are one head of keys and there
// would be fewer items than threads, fewer do.
int Ops::heads_together(const Attention& a, int share) const {
    constexpr int LEAST = 8;
    const int most = std::min(share, ROW_BLOCK), queries = ROW_BLOCK / most;
    if (!a.shape->shared) return most;
    int items = 0;
    for (size_t sequence = 0; sequence < a.step->seq_lens.size(); sequence++)
        items += (a.step->query_start[sequence + 1] - a.step->query_start[sequence] + queries - 1) / queries;
    items *= (share + most - 1) / most;
    if (items == 0 || items >= threads()) return most;
    const int parts = (threads() + items - 1) / items;
    return std::clamp((most + parts - 1) / parts, std::min(LEAST, most), most);
}

AttentionBlock Ops::attention_block(const Attention& a, const Attend& item) const {
    const StepAttention& step = *a.step;
    const size_t size = size_of(a.dtype), key_dim = a.shape->key_dim, value_dim = a.shape->value_dim;
    AttentionBlock b;
    b.q_stride = a.q_heads * key_dim, b.out_stride = a.q_heads * value_dim;
    b.q = at(a.q, (item.first * b.q_stride + item.head * key_dim) * size);
    b.out = at(a.out, (item.first * b.out_stride + item.head * value_dim) * size);
    b.queries = item.queries, b.group = item.heads;
    b.first_position = step.seq_lens[item.sequence] - (step.query_start[item.sequence + 1] - item.first);
    b.window = step.window, b.scale = a.scale, b.softcap = a.softcap, b.sinks = a.sinks ? a.sinks + item.head : nullptr;
    b.cache = a.cache, b.block_table = step.block_table.data() + size_t(item.sequence) * step.table_width;
    b.kv_head = item.kv_head;
    if (!step.first_keys.empty()) b.first_key = step.first_keys[item.sequence];
    if (step.whole) b.last_key = step.seq_lens[item.sequence] - 1;
    if (a.bias) {
        b.reach = a.reach, b.bias_stride = 2 * size_t(a.reach) + 1;
        b.bias = a.bias + item.head * b.bias_stride + a.reach;
    }
    // All scores of a row are less by the same without it, which only a cap and sinks see.
    if (a.key_offset && (a.softcap != 0 || a.sinks)) b.key_offset = a.key_offset + item.kv_head * key_dim;
    return b;
}

void Ops::attention(const Attention& a) {
    std::lock_guard<std::mutex> only(one_caller_);
    plan_attention(a);
    const int items = int(attends_.size());
    // Where there are few items, each split of the keys is one.
    splits_.clear();
    for (int i = 0; items < few_items() && i < items; i++) {
        const AttentionBlock b = attention_block(a, attends_[i]);
        const int first = std::max(b.first_key, b.window ? b.first_position - b.window + 1 : 0);
        const int stop = b.last_key < 0 ? b.first_position + b.queries : b.last_key + 1;
        attends_[i].first_split = int(splits_.size());
        for (int split = first / KEY_SPLIT; split * KEY_SPLIT < stop; split++) splits_.push_back({i, split});
    }
    const size_t need = attention_need(*a.shape);
    const auto attend = (a.shape->type == INT8_CACHE ? kernels_->attention_int8 : kernels_->attention)[a.dtype];
    if (int(splits_.size()) <= items) {
        pool_.run(items, [&](int item, int thread) {
            attend(attention_block(a, attends_[item]), *a.shape, scratch_[thread].need(need));
        });
        return;
    }
    // Of a split its rows' states are kept until they are joined: of a wave of items at a time, or they would take as much as all
    // threads' contexts together.
    const size_t of_a_split = split_need(*a.shape);
    const auto splits_before = [&](int item) { return item < items ? attends_[item].first_split : int(splits_.size()); };
    for (int item = 0, last; item < items; item = last) {
        const int first = splits_before(item);
        for (last = item + 1; last < items && splits_before(last) - first < wave();) last++;
        float* states = shared_.need((splits_before(last) - first) * of_a_split);
        pool_.run(splits_before(last) - first, [&](int i, int thread) {
            const Split& split = splits_[first + i];
            AttentionBlock b = attention_block(a, attends_[split.attend]);
            b.split = split.split, b.room = scratch_[thread].need(need);
            attend(b, *a.shape, states + i * of_a_split);
        });
        pool_.run(last - item, [&](int i, int) {
            const int from = splits_before(item + i), count = splits_before(item + i + 1) - from;
            kernels_->join_splits[a.dtype](attention_block(a, attends_[item + i]), *a.shape, states + (from - first) * of_a_split, of_a_split, count);
        });
    }
}

}  // namespace moebius
