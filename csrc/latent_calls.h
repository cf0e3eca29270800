// What the operations of latent attention are given; as in ops.h, pointers are to contiguous row-major arrays of the caller's.
#pragma once
#include <vector>

#include "kernels.h"

namespace moebius {

struct Matrix;

// A matrix (out, in) for each head.
struct HeadMatrices {
    Dtype dtype;
    int in, out;
    std::vector<Matrix> weights;
};

// Of each head of x (rows, heads, in + kept): the product of its first values with its matrix, and behind it the others as they
// are, (rows, heads, out + kept).
struct HeadProducts {
    const HeadMatrices* heads;
    const void* x;
    int kept;
    void* out;
};

// Normalises latents and turns what stands behind them, into a cache whose values are the first ones of its keys; and turns the
// ends of queries.
struct StoreLatent {
    Dtype dtype;
    const CacheShape* shape;
    void* q;  // (rows, q_heads, key_dim), changed in place
    int q_heads;
    const void* latent;  // (rows, key_dim)
    NormWeight norm;     // (value_dim,)
    float eps;
    const float* cos;  // (rows, half), like sin
    const float* sin;
    int half;
    bool interleaved;
    const int64_t* slots;  // (rows,)
    uint32_t* cache;       // the layer's
    // Queries at position p become 1 + beta * ln(1 + p / original) times as large, where there are positions.
    const int64_t* positions;  // (rows,) or null
    float beta;
    int64_t original;
};

}  // namespace moebius
