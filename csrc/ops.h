// Operations on whole steps, spread over threads. Pointers are to contiguous row-major arrays that the caller owns.
#pragma once
#include <initializer_list>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "latent_calls.h"
#include "panels.h"
#include "pool.h"
#include "recurrent_calls.h"
#include "sampling.h"

namespace moebius {

// The best instruction set that this processor has and `limit` allows: "" for no limit, or portable, avx2, avx512,
// avx512vnni, avx512bf16, amx, neon. Throws std::invalid_argument for another name or one that the processor lacks.
const Kernels* select_kernels(const std::string& limit);
std::vector<std::string> available_kernels();

// A weight (rows, columns) as it lies in its file.
struct Matrix {
    Format format;
    int rows, columns;
    const void* data;
    // Of FP8: block after block, and how many rows and columns share one.
    std::shared_ptr<const std::vector<float>> scales = nullptr;
    int block_rows = 1, block_columns = 1;
    // Of blocks of codes alone. Zero points that had to be unpacked are held here.
    GroupScales groups = {};
    std::shared_ptr<const std::vector<int8_t>> zeros = nullptr;
    // Of columns that lie in an order of their own, which one each is; and a number that matrices beside it have too where
    // theirs is the same, 0 where there is none.
    std::shared_ptr<const std::vector<int32_t>> order = nullptr;
    int order_number = 0;

    size_t row_bytes() const { return size_t(blocks()) * FORMAT_SIZES[format].bytes; }
    size_t bytes() const { return rows * row_bytes(); }
    int blocks() const { return columns / FORMAT_SIZES[format].elements; }  // of a row
    const void* row(int64_t i) const { return static_cast<const char*>(data) + i * row_bytes(); }
    int64_t groups_of_a_row() const { return blocks() / groups.blocks; }
    GroupScales groups_from(int64_t row) const {
        GroupScales from = groups;
        const int64_t skipped = row * groups_of_a_row();
        if (from.data) from.data = static_cast<const char*>(from.data) + skipped * SCALE_BYTES[from.type];
        if (from.zeros) from.zeros += skipped;
        if (from.biases) from.biases = static_cast<const char*>(from.biases) + skipped * SCALE_BYTES[from.type];
        return from;
    }
    // Of the blocks that row i is in.
    const float* row_scales(int64_t i) const { return scales->data() + i / block_rows * scales_of_a_row(); }
    int64_t scales_of_a_row() const { return (columns + block_columns - 1) / block_columns; }
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

// One layer's experts: down(act(gate x) * up x), or, without an up, down(act(gate x)).
struct Experts {
    Dtype dtype;
    int hidden, width;
    Activation activation;
    std::vector<Matrix> gate, up, down;                      // (width, hidden), (width, hidden) or none, (hidden, width)
    std::vector<const void*> gate_bias, up_bias, down_bias;  // as many, of the experts' dtype, or empty
    bool holes = false;  // some are not held here: their matrices have no data
    bool on_disk = false;  // their pages need not be in memory: those of the chosen are asked for before they are read

    bool interleaved = false;  // rows of gate and up take turns in the matrices `gate`, (2 * width, hidden)

    bool two_matrices() const { return up.empty() && !interleaved; }
    int gate_rows() const { return interleaved ? 2 : 1; }  // for each column of what they give
};

struct StepAttention {  // what all layers with one window share
    std::vector<int32_t> query_start, seq_lens, block_table;
    int table_width = 0, window = 0;
    int block_size = 1, last_block = -1;  // of the table, and the largest number in it
    std::vector<int32_t> first_keys;      // of each sequence, before which its rows see none; empty for 0
    bool whole = false;                   // rows see all of their sequence's keys, wherever they are themselves
};

struct RouterSettings {
    int num_experts, top_k;
    int score;   // 0 softmax, 1 sigmoid, 2 logits
    int weight;  // 0 raw, 1 renorm, 2 softmax, 3 sigmoid
    int num_groups, groups_kept, group_top2;
    float group_fill, renorm_eps, scale, softcap;  // softcap 0: none
    float renorm_least = 0;                        // what the divisor of renorm is at least
};

struct Logits {
    float* values;  // (count, vocab)
    int count, vocab;
    // Empty, or for each row the ids that may be drawn, all where it is null: id i if bit i % 32 of word i / 32 is set. All
    // others that are finite are the lowest number to who reads the row.
    std::vector<const uint32_t*> allowed{};

    float* row(int i) const { return values + size_t(i) * vocab; }
    // Throws std::out_of_range for a row that is not there, std::invalid_argument for too few words.
    void allow(int row, const uint32_t* ids, size_t words);
    // Throws std::out_of_range for a row that is not there, std::invalid_argument for other than one parameter a row.
    void check(const std::vector<int32_t>& rows, std::initializer_list<size_t> parameters) const;
};

// What a layer's router has done since the start, or nulls where nobody counts.
struct RouterTally {
    int64_t* pairs;  // (num_experts,): (token, choice) pairs that each expert got
    double* sums;    // (2,): the tokens' entropies in nats, and how many tokens
};

// x (rows, size), `stride` elements apart like those of update, sum and out: sum = x + multiplier * update where there is an
// update (else sum is not written), times `scale` where there is one; out = norm(sum) * weight.
struct RmsNorm {
    Dtype dtype;
    const void* x;
    const void* update;  // or null
    float multiplier;
    NormWeight weight;  // (size,)
    int size, stride;
    float eps;
    void* sum;
    void* out;
    bool less_mean = false;  // a layer norm: of x less its mean
    const float* scale = nullptr;  // (1,) or null
};

// Normalises (where norms are given) and rotates queries into q_out, and keys into the cache with their values.
struct RotateAndStore {
    Dtype dtype;
    const CacheShape* shape;
    const void* qkv;  // (rows, ...): a token's query, key and value heads side by side
    int q_heads;
    bool gated;  // behind each query head stand as many gates, which are left alone
    const float* cos;  // (rows, half), like sin
    const float* sin;
    int half;            // of what is rotated of a head
    bool interleaved;    // neighbours are rotated together, else i and half + i
    NormWeight q_norm;  // (key_dim,) or null, like k_norm
    NormWeight k_norm;
    float eps;
    const int64_t* slots;  // (rows,)
    uint32_t* cache;       // the layer's
    void* q_out;           // (rows, q_heads, key_dim)
    const float* key_offset = nullptr;  // (kv_heads, key_dim) or null: what codes of keys are made less
    bool turned_first = false;          // heads are rotated, and rounded, before they are normed
    bool keys_as_values = false;        // values are the keys as they were projected, and have no columns of their own
    bool normed_values = false;         // values are normed, without a weight
    bool queries_alone = false;         // there are neither keys nor values, and the cache is left alone
};

struct Attention {
    Dtype dtype;
    const CacheShape* shape;
    const StepAttention* step;
    const uint32_t* cache;  // the layer's
    const void* q;          // (rows, q_heads, key_dim)
    int q_heads;
    float scale, softcap;  // softcap 0: none
    const float* sinks;    // (q_heads,) or null
    void* out;             // (rows, q_heads, value_dim)
    const float* key_offset = nullptr;  // as in RotateAndStore
    const float* bias = nullptr;        // (q_heads, 2 * reach + 1) or null: what is added to scores, by distance from -reach on
    int reach = 0;
};

// weights (rows, top_k), but 0 for a choice whose expert has had `capacity` choices of the sequence's tokens before.
struct WithinCapacity {
    const StepStates* step;  // which rows are whose
    const float* weights;
    const int64_t* ids;
    int top_k, experts, capacity;
    float* out;
};

// x (rows, size) with every value between -limit and limit; NaN stays NaN.
struct Clip {
    Dtype dtype;
    const void* x;
    int size;
    float limit;
    void* out;
};

constexpr int ROW_BLOCK = 64;  // rows of x that pass while a chunk of weights is in the second cache
constexpr int MOST_COLUMNS = 256;  // of a product that one item computes
// Rows of weights in blocks that are widened at a time, where activations are not quantised.
constexpr int WIDENED_ROWS = 16;

class Ops {
public:
    // float_activations: what meets weights in blocks is not quantised. ordered: products of plain numbers are summed in one
    // order, that of every instruction set, not in the fastest.
    Ops(const std::string& limit, int threads, bool float_activations = false, bool ordered = false)
        : kernels_(select_kernels(limit)), float_activations_(float_activations), ordered_(ordered), pool_(threads), scratch_(threads) {}

    const char* name() const { return kernels_->name; }
    int threads() const { return pool_.threads(); }

    // Bytes that operations keep between calls, and the most that they ever will for products over `widest` inputs and for
    // attention to a cache of this shape over up to `context` keys.
    size_t scratch_bytes() const;
    size_t most_scratch_bytes(int widest, const CacheShape& shape, int context) const;

    // out = multiplier * table[ids]. Throws std::out_of_range for an id that is no row of the table.
    void embed(Dtype dtype, const Matrix& table, const int64_t* ids, int rows, float multiplier, void* out);
    // out = x w^T + bias as the layers' dtype or, with `wide`, float32
    void linear(const Linear& l, const void* x, int rows, void* out, bool wide);
    // out = sum over k of weights[k] * expert ids[k]; without ids, expert 0 alone. For a while it needs `inner`, (rows, top_k,
    // width), and with ids `outer`, (rows, top_k, hidden). Throws std::out_of_range for an id that is no expert's, or one's
    // that is not held here.
    void experts(const Experts& e, const void* x, int rows, const float* weights, const int64_t* ids, int top_k, void* inner,
                 void* outer, void* out);
    // The two halves of `experts`. out[k] = expert ids[k], (rows, top_k, hidden), for a while with `inner`; what an id of as
    // many as there are experts leaves alone.
    void expert_rows(const Experts& e, const void* x, int rows, const int64_t* ids, int top_k, void* inner, void* out);
    // out = the sum over k of weights[k] * x[k], in that order: x (rows, top_k, size)
    void combine(Dtype dtype, const void* x, const float* weights, int rows, int top_k, int size, void* out);
    // out = a + sigmoid(gate) * b, row by row; gate (rows,) float32 or null for 1
    void add_gated(Dtype dtype, const void* a, const void* b, const float* gate, int rows, int n, void* out);
    void rms_norm(const RmsNorm& n, int rows);
    void clip(const Clip& c, int rows);
    // out = x / divisor, both float32 (rows, size)
    void divide(const float* x, int rows, int size, float divisor, float* out);
    // out = cap * tanh(x / cap), likewise
    void softcap(const float* x, int rows, int size, float cap, float* out);
    // cos and sin of positions * inverse, times factor: (rows, half) each
    void rotation(const int64_t* positions, int rows, const float* inverse, int half, float factor, float* cos, float* sin);
    void rotate_and_store(const RotateAndStore& r, int rows);
    void attention(const Attention& a);  // of the rows that its step says
    // Recurrent layers (recurrent_ops.cpp), the first three of the rows that their step says.
    void causal_conv(const CausalConv& c);
    void gated_delta(const GatedDelta& d);
    void selective_scan(const SelectiveScan& s);
    void gated_norm(const GatedNorm& n, int rows);
    void grouped_norm(const GroupedNorm& n, int rows);
    void gate_heads(const GateHeads& g, int rows);
    // Latent attention (latent_ops.cpp), beside `attention` on a cache whose keys and values are shared.
    void head_products(const HeadProducts& p, int rows);
    void rotate_and_store_latent(const StoreLatent& s, int rows);
    // Adds to the tally what it chose.
    // expert_scale (num_experts,), or null, multiplies the weights of each expert.
    void route(const RouterSettings& r, const float* logits, int rows, const float* selection_bias, const float* expert_scale,
               float* weights, int64_t* ids, const RouterTally& tally);
    void within_capacity(const WithinCapacity& w);  // of the rows that its step says
    // Of each of the rows: the lowest id of the largest logit, NOT_FINITE where one is not finite, ALL_BANNED where that is
    // the lowest number.
    std::vector<int64_t> argmax(const Logits& x, const std::vector<int32_t>& rows);
    // Of each of the rows: log of the sum of exp(logit / temperature) (NaN where a logit is not finite), and its `count`
    // (at most the vocabulary) largest in order with their ids, ties to the lowest id, row after row.
    void log_softmax_top_k(const Logits& x, const std::vector<int32_t>& rows, const std::vector<int32_t>& counts,
                           const std::vector<float>& temperatures, double* log_sums, float* values, int64_t* ids);
    // Of each of the rows: the first id whose exp(logit / temperature), summed with all before it, exceeds uniform times the
    // whole sum, or as `argmax` where there is none.
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
        // Rows of x as products want them, each kind once for a thread's items: packed for plain numbers, quantised for blocks
        // of each kind; and, where they are not quantised, widened, and packed as float32.
        struct Packed {
            std::vector<char> bytes;
            uint64_t call = 0;
            int first = 0, columns = 0;
            const void* order = nullptr;
        };
        // And beside FP8, packed block by block.
        Packed packed[1 + BLOCK_SIZES], unquantised[2], in_blocks;
        std::vector<char> panels;  // of one item
        std::vector<char> widened;  // rows of weights
        std::vector<char> ordered;  // a row of x in a matrix' order

        static constexpr size_t SPARE = 16;  // floats, for alignment
        float* need(size_t n) {
            if (floats.size() < n + SPARE) renew(floats, n + SPARE);
            return aligned(floats.data());
        }
        // Not a byte more than was planned: a vector that grows takes up to twice as much, and copies.
        template <class T> static void renew(std::vector<T>& v, size_t n) {
            std::vector<T>().swap(v);
            v.resize(n);
        }
        size_t bytes() const {
            size_t sum = floats.capacity() * sizeof(float);
            for (const Packed& each : packed) sum += each.bytes.capacity();
            for (const Packed& each : unquantised) sum += each.bytes.capacity();
            return sum + in_blocks.bytes.capacity() + panels.capacity() + widened.capacity() + ordered.capacity();
        }
        template <class T> static T* aligned(T* p) { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(p) + 63) / 64 * 64); }
    };
    struct Product {  // rows of x times some columns of an expert, or of a layer
        int weights, first, count, column, columns;
    };
    struct PanelRows {  // of an expert, or of all layers; in tiles they begin at row `tiled`
        int weights, first, count, tiled;
    };
    struct PanelProduct {
        PanelRows rows;
        int column, columns;
    };
    struct Kind {  // of what rows are laid in tiles for
        Format format;
        int order_number;
        bool operator==(const Kind& other) const { return format == other.format && order_number == other.order_number; }
    };
    struct Tiled {  // where rows lie in tiles for one kind
        Kind kind;
        size_t at, row_bytes;
    };
    struct Attend {  // some queries of one sequence, with some query heads of one kv head
        int sequence, first, queries;
        int kv_head, head, heads;
        int first_split;  // in splits_
    };
    struct Split {  // of the keys of an item of attends_
        int attend, split;
    };

    // Sorts pairs (token, choice) by expert: those of e are pairs_[starts_[e]] to pairs_[starts_[e + 1] - 1]. Without ids all are
    // of expert 0. With `skip`, the number after the last expert's stands for none.
    void sort_pairs(const Experts& e, const int64_t* ids, int pairs, bool skip);
    // Has the system read what the sorted pairs' experts lie in, all of it at once.
    void fetch(const Experts& e) const;
    // Each sorted pair's row of its expert, to the pair's place in out.
    void pair_rows(const Experts& e, const void* x, int top_k, void* inner, void* out);
    int item_columns(size_t row_bytes, int columns) const;
    // Of experts that `takes`. row_bytes(e) is what one column of expert e's products reads.
    template <class Takes, class RowBytes> void plan_products(int columns_in_all, const Takes& takes, const RowBytes& row_bytes);
    // What a product found, with its bias, to its place in out; of experts, gated, to the sorted pairs' rows of inner, or from
    // there to the pairs' places.
    void store_columns(const Linear& l, const Linear::Layer& layer, const Product& p, const float* c, void* out, bool wide);
    void store_gated(const Experts& e, const Product& p, float* gate, float* up, void* inner);
    void store_down(const Experts& e, const Product& p, const float* c, void* out);
    void plan_attention(const Attention& a);
    // Floats of one item of attention, and whether so many items are few: then each split of their keys is one. Of a sequence there
    // are at most so many, of which a window may begin and end in the middle of one.
    static size_t attention_need(const CacheShape& s) { return (attention_scratch(ROW_BLOCK, s) + 15) / 16 * 16; }
    static size_t split_need(const CacheShape& s) { return (states_floats(ROW_BLOCK, s) + 15) / 16 * 16; }
    int few_items() const { return 2 * pool_.threads(); }
    static size_t most_splits(int context) { return context / KEY_SPLIT + 2; }
    // Splits that are as many as keep all threads at work: those of so many, and of whole items, are computed before they are joined.
    int wave() const { return 4 * pool_.threads(); }
    int heads_together(const Attention& a, int share) const;
    // Columns of an item, whole vectors, of so many that are divided where there are few items without.
    int divided_columns(int columns, int items) const;
    AttentionBlock attention_block(const Attention& a, const Attend& item) const;
    // Calls the kernel with these rows of x, packed where it wants them so: once for a thread's items. `first` tells them from
    // all others of this call.
    // Of w it takes the rows from `column` on, as many as c has columns.
    void product(Dtype dtype, const void* const* x, int first, int m, const Matrix& w, int column, const void* next, float* c,
                 int columns, Scratch& scratch);
    // What `pack` makes of the rows from `first` of this call's, in so many bytes; made anew where `packed` has others.
    // columns: of a block, of what is packed block by block. order: that of the columns, where they have one of their own.
    template <class Pack> const void* packed(Scratch::Packed& packed, int first, size_t bytes, const Pack& pack, int columns = 0,
                                             const void* order = nullptr) {
        if (packed.bytes.size() < bytes + 64) Scratch::renew(packed.bytes, bytes + 64), packed.call = 0;
        void* to = Scratch::aligned(packed.bytes.data());
        if (packed.call != calls_ || packed.first != first || packed.columns != columns || packed.order != order) pack(to);
        packed.call = calls_, packed.first = first, packed.columns = columns, packed.order = order;
        return to;
    }
    // m rows of x, quantised, their columns in this order, or as they lie.
    void quantise(Dtype dtype, BlockSize size, const void* const* x, int m, int k, const std::vector<int32_t>* order, Scratch& scratch,
                  void* to) const;

    // Many rows and weights in blocks (panel_ops.cpp).
    const PanelKernels& panels() const { return *kernels_->blocks->panels; }
    int batch_rows(size_t formats) const;
    size_t most_tile_bytes(int widest) const;
    size_t most_panel_bytes(int widest) const;
    size_t panel_bytes(const Matrix& w) const;
    char* panel_room(size_t bytes, int thread);
    char* tiles_of(const Tiled& tiled, int row);
    template <class RowAt, class MatricesOf>
    void lay_in_tiles(Dtype dtype, const std::vector<Kind>& kinds, int k, const RowAt& row_at, const MatricesOf& matrices_of);
    template <class Matrices>
    void lay_tile(Dtype dtype, BlockSize size, const void* const* x, const PanelRows& tile, int k, const Matrices& matrices, Scratch& scratch);
    template <class Matrices> void plan_panels(const PanelRows& rows, const Matrices& matrices);
    void cut_panel_products();
    char* unpack_panels(const PanelProduct& p, const Matrix& w, char* to) const;
    void panel_product(const PanelProduct& p, const Matrix& w, const char* unpacked, int row, int m, const Stretch& next,
                       float* c);
    template <class MatricesOf> Stretch next_panels(int item, int n, const MatricesOf& matrices_of) const;
    template <class MatricesOf, class Store> void run_panel_products(const MatricesOf& matrices_of, const Store& store);
    template <class Takes, class Run> void each_panel_batch(size_t formats, const Takes& takes, const Run& run);
    bool by_panels(int rows, std::initializer_list<Format> formats) const;
    bool gate_by_panels(const Experts& e, int expert) const;
    bool down_by_panels(const Experts& e, int expert) const;
    void linear_by_panels(const Linear& l, const void* x, int rows, void* out, bool wide);
    template <class Takes, class MatricesOf, class RowAt, class Store>
    void experts_by_panels(Dtype dtype, const Takes& takes, const MatricesOf& matrices_of, const RowAt& row_at, const Store& store);
    void gate_and_up_by_panels(const Experts& e, const void* x, int top_k, void* inner);
    void down_by_panels(const Experts& e, const void* inner, void* out);

    // Rows are sorted by head, each head's of all tokens: where the i-th stands, and what a product found to its place, with what
    // is kept beside it.
    const void* head_row(const HeadProducts& p, int rows, int i) const;
    void store_heads(const HeadProducts& p, int rows, const Product& product, const float* c) const;
    void heads_by_panels(const HeadProducts& p, int rows);

    // FP8 (fp8_ops.cpp).
    static bool by_codes(const Matrix& w);
    void fp8_product(Dtype dtype, const void* const* x, int first, int m, const Matrix& w, int column, const void* next, float* c,
                     int columns, Scratch& scratch);

    // Blocks where activations are not quantised, what has no other kernels, and float32 weights in a layer of fewer bits
    // (widened_ops.cpp).
    void wide_product(Dtype dtype, const void* const* x, int first, int m, const Matrix& w, int column, const void* next, float* c,
                      int columns, Scratch& scratch);
    void widened_product(Dtype dtype, const void* const* x, int first, int m, const Matrix& w, int column, float* c, int columns,
                         Scratch& scratch);
    // room: of as many columns, where these lie in an order of their own.
    void widen_row(const Matrix& w, int64_t row, float* to, float* room) const;
    // m rows of x as float32: rows of k, one behind the other, and where each lies.
    void as_floats(Dtype dtype, const void* const* x, int first, int m, int k, Scratch& scratch, const void** rows);
    // For WIDENED_ROWS of k float32 numbers, and one more.
    static void* widened_room(int k, Scratch& scratch);
    static size_t widened_bytes(int k) { return size_t(WIDENED_ROWS + 1) * k * sizeof(float); }
    static size_t most_widened_bytes(int widest) {
        return size_t(ROW_BLOCK) * widest * sizeof(float) + packed_bytes(ROW_BLOCK, widest) + widened_bytes(widest) + 3 * 64;
    }

    const Kernels* kernels_;
    const bool float_activations_, ordered_;
    std::mutex one_caller_;  // of what uses the members below
    Pool pool_;
    std::vector<Scratch> scratch_;
    // Kept between calls, so that a step allocates nothing once its size has been seen.
    std::vector<int> starts_, pairs_;
    std::vector<Product> products_;
    std::vector<PanelRows> panel_rows_, panel_tiles_;
    std::vector<PanelProduct> panel_products_;
    std::vector<Tiled> tiled_;
    std::vector<char> tiles_;
    std::vector<Attend> attends_;
    std::vector<Split> splits_;
    Scratch shared_;
    uint64_t calls_ = 0;  // of products
};

}  // namespace moebius
