// Latent attention's own operations on whole steps; products of heads are in ops.cpp and panel_ops.cpp.
#include <algorithm>
#include <cmath>

#include "bytes.h"
#include "ops.h"

namespace moebius {

void Ops::rotate_and_store_latent(const StoreLatent& s, int rows) {
    const CacheShape& shape = *s.shape;
    const size_t size = size_of(s.dtype), row_bytes = shape.key_dim * size, latent_bytes = shape.value_dim * size;
    const int turning = shape.key_dim - shape.value_dim, together = 4;
    const auto norm = kernels_->rms_norm[s.dtype][s.norm.dtype];
    const auto rotate = kernels_->rotate[s.dtype][s.dtype];
    const auto scale = kernels_->scaled_row[s.dtype][s.dtype == BF16 ? BF16_MATRIX : F32_MATRIX];
    pool_.run((rows + together - 1) / together, [&](int item, int thread) {
        float* key = scratch_[thread].need(shape.key_dim);
        for (int t = item * together; t < std::min(rows, (item + 1) * together); t++) {
            const float *cos = s.cos + size_t(t) * s.half, *sin = s.sin + size_t(t) * s.half;
            const char* latent = at(s.latent, t * row_bytes);
            norm(latent, nullptr, 1.0f, nullptr, s.norm.values, shape.value_dim, s.eps, false, nullptr, key);
            rotate(latent + latent_bytes, nullptr, 0, cos, sin, s.half, s.interleaved, turning, at(key, latent_bytes));
            write_key(s.dtype, shape, s.cache, key, s.slots[t], 0);
            char* queries = at(s.q, t * s.q_heads * row_bytes);
            for (int h = 0; h < s.q_heads && s.half > 0; h++) {
                char* end = queries + h * row_bytes + latent_bytes;
                rotate(end, nullptr, 0, cos, sin, s.half, s.interleaved, turning, end);
            }
            if (!s.positions || s.positions[t] < s.original) continue;
            const float factor = float(1.0 + double(s.beta) * std::log1p(double(s.positions[t] / s.original)));
            scale(queries, factor, s.q_heads * shape.key_dim, queries);
        }
    });
}

}  // namespace moebius
