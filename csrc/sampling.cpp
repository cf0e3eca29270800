// From logits to tokens: the same operations as ops/sampling.py. A row is one thread's; its result and cost are its own.
#include "sampling.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "ops.h"

namespace moebius {
namespace {

// A heap of so many candidates finds them faster than a sort does.
constexpr int MOST_IN_HEAP = 512;
constexpr float LOWEST = std::numeric_limits<float>::lowest();

// A float's bits, so that the larger float has the smaller key. Adding 0 makes -0.0 equal to 0.0, and subnormal numbers,
// which no comparison here tells from it. Signs cannot be predicted: without a branch it is four times as fast.
uint32_t key_of(float x) {
    x += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &x, 4);
    return uint32_t(bits) ^ (~uint32_t(bits >> 31) & 0x7fffffffu);
}

// The digits of a key, the last first.
struct Digit {
    int shift, bits;
};
constexpr Digit DIGITS[] = {{0, 10}, {10, 11}, {21, 11}};
using Counts = std::array<int, 1 << 11>;

// The key of the k-th largest of n floats, and how many that have it are among the k.
uint32_t key_of_rank(const float* x, int n, int k, int* equal) {
    uint64_t found = 0;
    for (int d = 2; d >= 0; d--) {
        const auto [shift, bits] = DIGITS[d];
        Counts counts{};
        for (int i = 0; i < n; i++) {
            const uint64_t key = key_of(x[i]);
            if (key >> (shift + bits) == found) counts[(key >> shift) & ((1u << bits) - 1)]++;
        }
        int digit = 0;
        while (k > counts[digit]) k -= counts[digit++];
        found = found << bits | uint64_t(digit);
    }
    *equal = k;
    return uint32_t(found);
}

// The k largest of n, in order. Takes as much memory again as `best`, however large n is.
void best_by_sort(const float* x, int n, int k, int64_t* best) {
    int equal, taken = 0;
    const uint32_t last = key_of_rank(x, n, k, &equal);
    // (key, id) as one number. Ids come in order, and the sort keeps the order of equal keys.
    for (int i = 0; i < n && taken < k; i++) {
        const uint32_t key = key_of(x[i]);
        best[taken] = int64_t(uint64_t(key) << 32 | uint32_t(i));
        taken += (key < last) | ((key == last) & (equal > 0));
        equal -= key == last;
    }
    std::vector<int64_t> other(k);
    int64_t *from = best, *to = other.data();
    for (const auto [shift, bits] : DIGITS) {
        const auto digit = [shift = shift + 32, mask = (1u << bits) - 1](int64_t a) { return (uint64_t(a) >> shift) & mask; };
        Counts places{};
        for (int i = 0; i < k; i++) places[digit(from[i])]++;
        for (int d = 0, first = 0; d < 1 << bits; d++) first += std::exchange(places[d], first);
        for (int i = 0; i < k; i++) to[places[digit(from[i])]++] = from[i];
        std::swap(from, to);
    }
    for (int i = 0; i < k; i++) best[i] = from[i] & 0xffffffff;
}

// The same for few.
void best_by_heap(const float* x, int n, int k, int64_t* best) {
    const auto before = [x](int64_t a, int64_t b) { return x[a] > x[b] || (x[a] == x[b] && a < b); };
    for (int i = 0; i < k; i++) best[i] = i;
    std::make_heap(best, best + k, before);  // the worst of the best k in front
    for (int i = k; i < n; i++)
        if (x[i] > x[best[0]]) {
            std::pop_heap(best, best + k, before);
            best[k - 1] = i;
            std::push_heap(best, best + k, before);
        }
    std::sort_heap(best, best + k, before);
}

// What becomes of one logit.
struct Change {
    int32_t id, times = 0;  // drawn so often
    bool repeated = false, banned = false;
    double bias = -0.0;  // which changes nothing, not even the sign of a zero
};

// One row's changes, each id once.
class Changes {
public:
    explicit Changes(const Shaping& s) {
        while ((size_t(1) << bits_) < 2 * s.num_ids()) bits_++;
        places_.assign(size_t(1) << bits_, -1);
        for (size_t i = 0; i < s.biased.size(); i++) of(s.biased[i]).bias = s.bias[i];
        for (int32_t id : s.seen) of(id).repeated = true;
        for (int32_t id : s.drawn) of(id).repeated = true, of(id).times++;
        for (int32_t id : s.banned) of(id).banned = true;
    }

    std::vector<Change> all;

private:
    // Found by hashing with open addressing.
    Change& of(int32_t id) {
        const size_t mask = places_.size() - 1;
        size_t at = (uint32_t(id) * 2654435769u) >> (32 - bits_);
        while (places_[at] >= 0 && all[places_[at]].id != id) at = (at + 1) & mask;
        if (places_[at] < 0) {
            places_[at] = int32_t(all.size());
            all.push_back({id});
        }
        return all[places_[at]];
    }

    int bits_ = 1;
    std::vector<int32_t> places_;  // in `all`, -1 for none
};

float changed(double x, const Change& c, const Shaping& s) {
    if (c.banned) return LOWEST;
    x += c.bias;
    if (c.repeated) x = x > 0 ? x / s.repetition : x * s.repetition;
    if (c.times) x -= s.presence + s.frequency * c.times;
    return float(x);
}

// For each byte of a set of ids, what eight logits are bounded by.
struct Bounds {
    float of[256][8];
    Bounds() {
        for (int byte = 0; byte < 256; byte++)
            for (int bit = 0; bit < 8; bit++) of[byte][bit] = byte >> bit & 1 ? std::numeric_limits<float>::infinity() : LOWEST;
    }
};

// The lesser of each of n logits and its bound, NaN where the logit is. Bounds are laid out first: then compilers see that
// what is left is done to many at a time.
void bound(const float* x, const uint32_t* allowed, int n, float* out) {
    static const Bounds bounds;
    alignas(64) float most[SUM_BLOCK];
    for (int i = 0; i < n; i += 8) std::memcpy(most + i, bounds.of[allowed[i / 32] >> (i % 32) & 255], sizeof bounds.of[0]);
    for (int i = 0; i < n; i++) out[i] = most[i] < x[i] ? most[i] : x[i];
}

// A row as it is drawn from. Where some ids alone are allowed it is bounded a block at a time, each time it is read: what a
// block takes is in the first cache, and the row is not written.
class Row {
public:
    Row(const Logits& x, int i) : x_(x.row(i)), allowed_(x.allowed.empty() ? nullptr : x.allowed[i]), size_(x.vocab) {}

    // The logits of a block of n ids, from a multiple of SUM_BLOCK on; they may lie in `room`.
    const float* block(int first, int n, float* room) const {
        if (!allowed_) return x_ + first;
        bound(x_ + first, allowed_ + first / 32, n, room);
        return room;
    }

    // All of them; they may lie in memory that is this thread's, until it asks for another row's.
    const float* whole() const {
        if (!allowed_) return x_;
        static thread_local std::vector<float> room;
        room.resize(size_);
        for (int i = 0; i < size_; i += SUM_BLOCK) block(i, std::min(SUM_BLOCK, size_ - i), room.data() + i);
        return room.data();
    }

    // As the kernel of that name, to the bit.
    void softmax_stats(const Kernels& kernels, float factor, float* largest, int* at, double* sum) const {
        if (!allowed_) return kernels.softmax_stats(x_, size_, factor, largest, at, sum);
        alignas(64) float room[SUM_BLOCK], ignored[SUM_BLOCK];
        *largest = -std::numeric_limits<float>::infinity(), *at = 0;
        for (int i = 0; i < size_; i += SUM_BLOCK) {
            const int n = std::min(SUM_BLOCK, size_ - i);
            float top;
            int id;
            kernels.softmax_stats(block(i, n, room), n, 1, &top, &id, nullptr);
            if (std::isnan(top)) {
                *largest = top, *at = 0;
                return;
            }
            if (top > *largest) *largest = top, *at = i + id;
        }
        if (!sum) return;
        *sum = 0;
        for (int i = 0; i < size_; i += SUM_BLOCK) {
            const int n = std::min(SUM_BLOCK, size_ - i);
            *sum += kernels.exp_row(block(i, n, room), n, *largest, factor, ignored);
        }
    }

private:
    const float* x_;
    const uint32_t* allowed_;
    int size_;
};

void shape_row(const Shaping& s, Shaped::Row& row) {
    const Changes changes(s);
    row.ids.reserve(changes.all.size()), row.values.reserve(changes.all.size());
    for (const Change& c : changes.all) row.ids.push_back(c.id), row.values.push_back(row.logits[c.id]);
    for (const Change& c : changes.all) row.logits[c.id] = changed(row.logits[c.id], c, s);
}

// What is drawn of a row with this largest logit.
int64_t drawn(float largest, int64_t id) { return std::isnan(largest) ? NOT_FINITE : largest == LOWEST ? ALL_BANNED : id; }

void check_ids(const std::vector<int32_t>& ids, int count, const char* what) {
    for (int32_t id : ids)
        if (id < 0 || id >= count) throw std::out_of_range(what + std::to_string(id) + " is none of " + std::to_string(count));
}

}  // namespace

void Shaped::restore() {
    for (Row& row : rows) {
        for (size_t i = 0; i < row.ids.size(); i++) row.logits[row.ids[i]] = row.values[i];
        row.ids.clear();
    }
}

void Logits::check(const std::vector<int32_t>& rows, std::initializer_list<size_t> parameters) const {
    check_ids(rows, count, "row ");
    for (size_t n : parameters)
        if (n != rows.size())
            throw std::invalid_argument(std::to_string(n) + (n == 1 ? " parameter for " : " parameters for ") + std::to_string(rows.size()) + " rows");
}

void Logits::allow(int row, const uint32_t* ids, size_t words) {
    check({row}, {});
    if (words * 32 < size_t(vocab))
        throw std::invalid_argument(std::to_string(words) + " words of allowed ids for a vocabulary of " + std::to_string(vocab));
    allowed.resize(count);
    allowed[row] = ids;
}

Shaped Ops::shape(const Logits& x, const std::vector<int32_t>& rows, const std::vector<const Shaping*>& shapings) {
    x.check(rows, {shapings.size()});
    for (const Shaping* s : shapings)
        for (const std::vector<int32_t>* ids : {&s->biased, &s->seen, &s->drawn, &s->banned}) check_ids(*ids, x.vocab, "token id ");
    Shaped shaped(rows.size());
    try {
        pool_.run(int(rows.size()), [&](int i, int) {
            shaped.rows[i].logits = x.row(rows[i]);
            shape_row(*shapings[i], shaped.rows[i]);
        });
    } catch (...) {
        shaped.restore();
        throw;
    }
    return shaped;
}

std::vector<int64_t> Ops::argmax(const Logits& x, const std::vector<int32_t>& rows) {
    x.check(rows, {});
    std::vector<int64_t> ids(rows.size());
    pool_.run(int(rows.size()), [&](int i, int) {
        float largest;
        int at;
        Row(x, rows[i]).softmax_stats(*kernels_, 1, &largest, &at, nullptr);
        ids[i] = drawn(largest, at);
    });
    return ids;
}

void Ops::log_softmax_top_k(const Logits& x, const std::vector<int32_t>& rows, const std::vector<int32_t>& counts,
                            const std::vector<float>& temperatures, double* log_sums, float* values, int64_t* ids) {
    x.check(rows, {counts.size(), temperatures.size()});
    std::vector<size_t> starts{0};
    for (int32_t count : counts) {
        if (count < 0 || count > x.vocab) throw std::invalid_argument(std::to_string(count) + " candidates of " + std::to_string(x.vocab));
        starts.push_back(starts.back() + count);
    }
    pool_.run(int(rows.size()), [&](int i, int) {
        const Row row(x, rows[i]);
        const float factor = 1.0f / temperatures[i];
        const int k = counts[i];
        float largest;
        double sum;
        int first;
        row.softmax_stats(*kernels_, factor, &largest, &first, &sum);
        log_sums[i] = double(largest) * factor + std::log(sum);
        if (!k) return;
        int64_t* best = ids + starts[i];
        const float* logits = row.whole();
        if (k == 1 || std::isnan(largest)) std::fill_n(best, k, first);
        else if (k <= MOST_IN_HEAP) best_by_heap(logits, x.vocab, k, best);
        else best_by_sort(logits, x.vocab, k, best);
        for (int j = 0; j < k; j++) values[starts[i] + j] = logits[best[j]];
    });
}

std::vector<int64_t> Ops::draw(const Logits& x, const std::vector<int32_t>& rows, const std::vector<float>& temperatures,
                               const std::vector<double>& uniforms) {
    x.check(rows, {temperatures.size(), uniforms.size()});
    std::vector<int64_t> ids(rows.size());
    pool_.run(int(rows.size()), [&](int item, int) {
        const Row row(x, rows[item]);
        const float factor = 1.0f / temperatures[item];
        alignas(64) float room[SUM_BLOCK], weights[SUM_BLOCK];
        float largest;
        double total, before = 0;
        int at;
        row.softmax_stats(*kernels_, factor, &largest, &at, &total);
        ids[item] = drawn(largest, at);
        if (ids[item] < 0) return;
        const double wanted = uniforms[item] * total;
        for (int i = 0; i < x.vocab; i += SUM_BLOCK) {
            const int n = std::min(SUM_BLOCK, x.vocab - i);
            const double here = kernels_->exp_row(row.block(i, n, room), n, largest, factor, weights);
            if (before + here <= wanted && i + n < x.vocab) {
                before += here;
                continue;
            }
            // Rounding may leave the sum just short of what is wanted: then it is the last id that has any weight.
            for (int j = 0; j < n && before <= wanted; j++)
                if (weights[j] > 0) at = i + j, before += weights[j];
            break;
        }
        ids[item] = at;
    });
    return ids;
}

std::vector<int64_t> Ops::ranks(const Logits& x, const std::vector<int32_t>& rows, const std::vector<int32_t>& token_ids) {
    x.check(rows, {token_ids.size()});
    check_ids(token_ids, x.vocab, "token id ");
    std::vector<int64_t> ranks(rows.size());
    pool_.run(int(rows.size()), [&](int i, int) {
        const float *row = Row(x, rows[i]).whole(), own = row[token_ids[i]];
        int before = 0;
        for (int j = 0; j < token_ids[i]; j++) before += row[j] >= own;
        for (int j = token_ids[i]; j < x.vocab; j++) before += row[j] > own;
        ranks[i] = before + 1;
    });
    return ranks;
}

}  // namespace moebius
