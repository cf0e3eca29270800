// What the exchanges of rows between ranks have in common, whatever they go through: where each row of a step goes, how long
// one waits for the others before one sleeps, and how ranks are found to be lost.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace moebius {

using Clock = std::chrono::steady_clock;

constexpr int MOST_RANKS = 64;  // sets of ranks are bits of one word
constexpr int MOST_AGREED = 16;

inline uint64_t bit(int rank) { return uint64_t(1) << rank; }

enum Doing : uint8_t { NOTHING, AGREE, DISPATCH, COMBINE, GATHER, SCATTER };

// They did not come in time; they were given up, or have ended; their connections have ended; they did something else.
enum class Fault { LATE, GONE, LEFT, OUT_OF_STEP };

// Ranks, as a set of bits, that others cannot go on with.
struct PeersLost : std::exception {
    PeersLost(uint64_t ranks, Fault fault) : ranks(ranks), fault(fault) {}
    const char* what() const noexcept override { return "ranks are lost"; }
    uint64_t ranks;
    Fault fault;
};

struct ExchangeTraffic {
    uint64_t calls = 0, bytes_out = 0, bytes_in = 0;
    double seconds_waited = 0;
};

// A rank's tokens of a layer. `owners` has `splits` rows of `experts`.
struct Tokens {
    const void* x;
    const int64_t* ids;
    int count;
    const int32_t* owners;
    int splits, experts;
};

// The ranks that token t's experts are at, as bits, and for each of its choices which.
inline uint64_t find_owners(const Tokens& tokens, int t, int top_k, int ranks, uint8_t* found) {
    const int32_t* owners = tokens.owners + size_t(t % tokens.splits) * tokens.experts;
    uint64_t needed = 0;
    for (int k = 0; k < top_k; k++) {
        const int64_t id = tokens.ids[size_t(t) * top_k + k];
        if (id < 0 || id >= tokens.experts)
            throw std::invalid_argument("row " + std::to_string(t) + " chose expert " + std::to_string(id) + " of " +
                                        std::to_string(tokens.experts));
        const int32_t owner = owners[id];
        if (owner < 0 || owner >= ranks)
            throw std::invalid_argument("expert " + std::to_string(id) + " is at rank " + std::to_string(owner) + " of " +
                                        std::to_string(ranks));
        found[k] = uint8_t(owner);
        needed |= bit(owner);
    }
    return needed;
}

// Neighbouring pairs that go one way go in one copy.
template <class Send> void for_each_run(const uint8_t* flags, size_t count, const Send& send) {
    for (size_t first = 0, stop; first < count; first = stop) {
        for (stop = first + 1; stop < count && flags[stop] == flags[first]; stop++) {}
        send(flags[first], first, stop - first);
    }
}

// How long a rank looks for the others before it sleeps: where each has a core, as long as one layer's ranks are likely to
// differ, since waking up takes some 50 microseconds; where they share cores, before it yields its own; and then.
class Patience {
public:
    enum Turn { LOOK, YIELD, SLEEP };

    explicit Patience(bool crowded) : crowded_(crowded), spin_(crowded ? CROWDED : MOST) {}

    Turn turn(Clock::duration waited) const {
        if (waited < spin_) return LOOK;
        return crowded_ && waited < spin_ + YIELDING ? YIELD : SLEEP;
    }

    // A wait longer than ranks differ: others compute where a rank should. Who looks on all the same has used up its own share of
    // the cores when its turn comes, and the whole group waits for it; who sleeps is let in at once.
    void learn(Clock::duration waited) {
        if (!crowded_) spin_ = waited < MOST ? std::min<Clock::duration>(2 * spin_, MOST) : std::max<Clock::duration>(spin_ / 4, CROWDED);
    }

private:
    static constexpr std::chrono::microseconds MOST{2000}, CROWDED{20}, YIELDING{200};

    const bool crowded_;
    Clock::duration spin_;
};

}  // namespace moebius
