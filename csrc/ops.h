// Operations on whole steps, spread over threads. Pointers are to contiguous row-major arrays that the caller owns.
#pragma once
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "sampling.h"

namespace moebius {

// The best instruction set that this processor has and `limit` allows: "" for no limit, or portable, avx2, avx512,
// avx512bf16, amx, neon. Throws std::invalid_argument for another name or one that the processor lacks.
const Kernels* select_kernels(const std::string& limit);
std::vector<std::string> available_kernels();

// A weight (rows, columns) as it lies in its file.
struct Matrix {
    Format format;
    int rows, columns;
    const void* data;

    size_t row_bytes() const { return size_t(columns) * (format == F32_MATRIX ? 4 : 2); }
    const void* row(int64_t i) const { return static_cast<const char*>(data) + i * row_bytes(); }
};

// Linear layers of one input; their outputs lie side by side in a row.
struct Linear {
    struct Layer {
        Matrix weight;     // (out, in)
        const void* bias;  // (out,) of the layer's dtype, or null
        int offset;        // of its first column in a row of the output
    };
    Dtype dtype;
    int in, out;
    std::vector<Layer> layers;
};

// One layer's experts: down(act(gate x) * up x).
struct Experts {
    Dtype dtype;
    int hidden, width;
    Activation activation;
    std::vector<Matrix> gate, up, down;                      // (width, hidden), (width, hidden), (hidden, width)
    std::vector<const void*> gate_bias, up_bias, down_bias;  // as many, of the experts' dtype, or empty
};

struct StepAttention {  // what all layers with one window share
    std::vector<int32_t> query_start, seq_lens, block_table;
    int table_width = 0, window = 0;
};

struct RouterSettings {
    int num_experts, top_k;
    int score;   // 0 softmax, 1 sigmoid, 2 logits
    int weight;  // 0 raw, 1 renorm, 2 softmax, 3 sigmoid
    int num_groups, groups_kept, group_top2;
    float group_fill, renorm_eps, scale, softcap;  // softcap 0: none
};

struct Logits {
    float* values;  // (count, vocab)
    int count, vocab;

    float* row(int i) const { return values + size_t(i) * vocab; }
    // Throws std::out_of_range for a row that is not there, std::invalid_argument for other than one parameter a row.
    void check(const std::vector<int32_t>& rows, std::initializer_list<size_t> parameters) const;
};

// What a layer's router has done since the start, or nulls where nobody counts.
struct RouterTally {
    int64_t* pairs;  // (num_experts,): (token, choice) pairs that each expert got
    double* sums;    // (2,): the tokens' entropies in nats, and how many tokens
};

// Operations as they were called on a step of one token, to be called again on a step of any length: all else that they
// were given, addresses above all, stays as it was.
struct Program {
    std::vector<uintptr_t> inputs;  // where the calls read what every step brings
    std::vector<std::function<void(int rows)>> calls;
};

class Ops {
public:
    Ops(const std::string& limit, int threads) : kernels_(select_kernels(limit)), pool_(threads), scratch_(threads) {}

    const char* name() const { return kernels_->name; }
    int threads() const { return pool_.threads(); }

    // Where calls are also noted, or null.
    Program* recorder = nullptr;
    // Calls `call(rows)`, and notes it. Throws std::logic_error for a noted call of other than one row.
    template <class Call> void submit(int rows, const Call& call) {
        if (recorder && rows != 1) throw std::logic_error("a recorded step has one token");
        if (recorder) recorder->calls.push_back(call);
        call(rows);
    }

    // out = multiplier * table[ids]. Throws std::out_of_range for an id that is no row of the table.
    void embed(Dtype dtype, const Matrix& table, const int64_t* ids, int rows, float multiplier, void* out);
    // out = x w^T + bias as the layers' dtype or, with `wide`, float32
    void linear(const Linear& l, const void* x, int rows, void* out, bool wide);
    void experts(const Experts& e, const void* x, int rows, const float* weights, const int64_t* ids, int top_k, void* out);
    // out = a + sigmoid(gate) * b, row by row; gate (rows,) float32 or null for 1
    void add_gated(Dtype dtype, const void* a, const void* b, const float* gate, int rows, int n, void* out);
    // Rows of x, update, sum and out lie `stride` elements apart.
    void rms_norm(Dtype dtype, const void* x, const void* update, float multiplier, const void* weight, int rows, int n, int stride,
                  float eps, void* sum, void* out);
    // cos and sin of positions * inverse, times factor: (rows, half) each
    void rotation(const int64_t* positions, int rows, const float* inverse, int half, float factor, float* cos, float* sin);
    // qkv holds a token's query, key and value heads side by side. Normalises (where norms are given) and rotates q into
    // q_out, and k into the cache with v.
    void rotate_and_store(Dtype dtype, const CacheShape& shape, const void* qkv, int rows, int q_heads,
                          const float* cos, const float* sin, int half, const void* q_norm, const void* k_norm, float eps,
                          const int64_t* slots, uint32_t* cache, void* q_out);
    void attention(Dtype dtype, const CacheShape& shape, const StepAttention& step, const uint32_t* cache, const void* q, int q_heads,
                   float scale, float softcap, const float* sinks, void* out);
    // Adds to the tally what it chose.
    void route(const RouterSettings& r, const float* logits, int rows, const float* selection_bias, float* weights, int64_t* ids,
               const RouterTally& tally);
    // Of each of the rows: the lowest id of the largest logit, or -1 where one is not finite.
    std::vector<int64_t> argmax(const Logits& x, const std::vector<int32_t>& rows);
    // Of each of the rows: log of the sum of exp(logit / temperature) (NaN where a logit is not finite), and its `count`
    // (at most the vocabulary) largest in order with their ids, ties to the lowest id, row after row.
    void log_softmax_top_k(const Logits& x, const std::vector<int32_t>& rows, const std::vector<int32_t>& counts,
                           const std::vector<float>& temperatures, double* log_sums, float* values, int64_t* ids);
    // Of each of the rows: the first id whose exp(logit / temperature), summed with all before it, exceeds uniform times the
    // whole sum, or -1 where a logit is not finite.
    std::vector<int64_t> draw(const Logits& x, const std::vector<int32_t>& rows, const std::vector<float>& temperatures,
                              const std::vector<double>& uniforms);
    // Of each of the rows: one token's place among all of the vocabulary, from 1.
    std::vector<int64_t> ranks(const Logits& x, const std::vector<int32_t>& rows, const std::vector<int32_t>& token_ids);
    // Changes the rows, each named once, in place until the result is restored. Throws std::out_of_range, with nothing
    // changed, for an id outside the vocabulary.
    Shaped shape(const Logits& x, const std::vector<int32_t>& rows, const std::vector<const Shaping*>& shapings);

private:
    struct Scratch {
        std::vector<float> floats;
        std::vector<const void*> rows;
        std::vector<char> packed;
        uint64_t packed_call = 0;
        int packed_first = 0;

        float* need(size_t n) {
            if (floats.size() < n + 16) floats.resize(n + 16);
            return aligned(floats.data());
        }
        template <class T> static T* aligned(T* p) { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }
    };
    struct Product {  // rows of x times some columns of one expert
        int expert, first, count, column, columns;
    };

    // row_bytes(e) is what one column of expert e's products reads.
    template <class RowBytes> void plan_products(int columns_in_all, const RowBytes& row_bytes);
    // Calls the kernel with the rows from `first` of this call's, packed where it wants them so: once for a thread's items.
    // Of w it takes the rows from `column` on, as many as c has columns.
    void product(Dtype dtype, const void* const* x, int first, int m, const Matrix& w, int column, const void* next, float* c,
                 int columns, Scratch& scratch);

    const Kernels* kernels_;
    std::mutex one_caller_;  // of what uses the members below
    Pool pool_;
    std::vector<Scratch> scratch_;
    // Kept between calls, so that a step allocates nothing once its size has been seen.
    std::vector<int> starts_, pairs_;
    std::vector<Product> products_;
    struct Split {
        int product, split;
    };
    std::vector<Split> splits_;
    Scratch shared_;
    uint64_t calls_ = 0;  // of products
    std::vector<char> hidden_, results_;
};

}  // namespace moebius
