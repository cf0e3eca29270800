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
    if (c.banned) return std::numeric_limits<float>::lowest();
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
            for (int bit = 0; bit < 8; bit++)
                of[byte][bit] = byte >> bit & 1 ? std::numeric_limits<float>::infinity() : std::numeric_limits<float>::lowest();
    }
};

// The lesser of each logit and its bound, NaN where the logit is. Bounds are laid out first: then compilers see that what is
// left is done to many at a time.
void ban_others(const uint32_t* allowed, int vocab, float* logits) {
    static const Bounds bounds;
    constexpr int AT_ONCE = 256;
    alignas(64) float most[AT_ONCE];
    for (int first = 0; first < vocab; first += AT_ONCE) {
        const int n = std::min(AT_ONCE, vocab - first);
        for (int i = 0; i < n; i += 8) {
            const uint32_t byte = allowed[(first + i) / 32] >> (i % 32) & 255;
            std::memcpy(most + i, bounds.of[byte], sizeof bounds.of[byte]);
        }
        float* x = logits + first;
        for (int i = 0; i < n; i++) x[i] = most[i] < x[i] ? most[i] : x[i];
    }
}

void shape_row(const Shaping& s, int vocab, float* kept, Shaped::Row& row) {
    const Changes changes(s);
    row.ids.reserve(changes.all.size()), row.values.reserve(changes.all.size());
    for (const Change& c : changes.all) row.ids.push_back(c.id), row.values.push_back(row.logits[c.id]);
    for (const Change& c : changes.all) row.logits[c.id] = changed(row.logits[c.id], c, s);
    if (!s.allowed) return;
    std::copy_n(row.logits, vocab, kept);
    row.whole = kept, row.size = size_t(vocab);
    ban_others(s.allowed, vocab, row.logits);
}

void check_ids(const std::vector<int32_t>& ids, int count, const char* what) {
    for (int32_t id : ids)
        if (id < 0 || id >= count) throw std::out_of_range(what + std::to_string(id) + " is none of " + std::to_string(count));
}

}  // namespace

void Shaped::restore() {
    for (Row& row : rows) {
        if (row.whole) std::copy_n(row.whole, row.size, row.logits);
        row.whole = nullptr;
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

Shaped Ops::shape(const Logits& x, const std::vector<int32_t>& rows, const std::vector<const Shaping*>& shapings, float* kept) {
    x.check(rows, {shapings.size()});
    for (const Shaping* s : shapings) {
        if (s->allowed && s->words * 32 < size_t(x.vocab))
            throw std::invalid_argument(std::to_string(s->words) + " words of allowed ids for a vocabulary of " + std::to_string(x.vocab));
        for (const std::vector<int32_t>* ids : {&s->biased, &s->seen, &s->drawn, &s->banned}) check_ids(*ids, x.vocab, "token id ");
    }
    Shaped shaped(rows.size());
    std::vector<float*> places(rows.size());  // of the rows that are kept whole, one behind the other
    for (size_t i = 0; i < rows.size(); i++)
        if (shapings[i]->allowed) places[i] = kept, kept += x.vocab;
    try {
        pool_.run(int(rows.size()), [&](int i, int) {
            shaped.rows[i].logits = x.row(rows[i]);
            shape_row(*shapings[i], x.vocab, places[i], shaped.rows[i]);
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
        kernels_->softmax_stats(x.row(rows[i]), x.vocab, 1, &largest, &at, nullptr);
        ids[i] = std::isnan(largest) ? -1 : at;
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
        const float *row = x.row(rows[i]), factor = 1.0f / temperatures[i];
        const int k = counts[i];
        float largest;
        double sum;
        int first;
        kernels_->softmax_stats(row, x.vocab, factor, &largest, &first, &sum);
        log_sums[i] = double(largest) * factor + std::log(sum);
        int64_t* best = ids + starts[i];
        if (k <= 1 || std::isnan(largest)) std::fill_n(best, k, first);
        else if (k <= MOST_IN_HEAP) best_by_heap(row, x.vocab, k, best);
        else best_by_sort(row, x.vocab, k, best);
        for (int j = 0; j < k; j++) values[starts[i] + j] = row[best[j]];
    });
}

std::vector<int64_t> Ops::draw(const Logits& x, const std::vector<int32_t>& rows, const std::vector<float>& temperatures,
                               const std::vector<double>& uniforms) {
    x.check(rows, {temperatures.size(), uniforms.size()});
    std::vector<int64_t> ids(rows.size());
    pool_.run(int(rows.size()), [&](int item, int) {
        const float *row = x.row(rows[item]), factor = 1.0f / temperatures[item];
        float largest, weights[SUM_BLOCK];
        double total, before = 0;
        int at;
        kernels_->softmax_stats(row, x.vocab, factor, &largest, &at, &total);
        if (std::isnan(largest)) {
            ids[item] = -1;
            return;
        }
        const double wanted = uniforms[item] * total;
        for (int i = 0; i < x.vocab; i += SUM_BLOCK) {
            const int n = std::min(SUM_BLOCK, x.vocab - i);
            const double here = kernels_->exp_row(row + i, n, largest, factor, weights);
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
        const float *row = x.row(rows[i]), own = row[token_ids[i]];
        int before = 0;
        for (int j = 0; j < token_ids[i]; j++) before += row[j] >= own;
        for (int j = token_ids[i]; j < x.vocab; j++) before += row[j] > own;
        ranks[i] = before + 1;
    });
    return ranks;
}

}  // namespace moebius
