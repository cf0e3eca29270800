// How the ranks of one host trade the rows of a step's tokens through memory that all have mapped.
//
// Every rank calls the same operations in the same order: agree, dispatch, combine, dispatch, combine, ..., gather, scatter.
// Each is: write, meet at a barrier, read. A rank that has passed barrier n knows that all have reached it, so that
//   - what anybody wrote before barrier n can be read after it (arriving releases, passing acquires);
//   - what was read after barrier n - 1 has been read by all, since each reads before it arrives at n.
// So whoever has passed barrier n may overwrite what was there to be read between n - 1 and n. Dispatch and gather have the
// same memory, and combine and scatter; between two of a kind is always a barrier of the other kind: one barrier each is
// enough. Agreements may follow each other, so there are two copies of theirs, for even and odd barriers.
//
// A rank may be killed or stopped at any instruction. It holds no lock, and the words that others wait for are written by
// it alone, so nobody depends on it but by its arrival, and for that everybody has a deadline.
#pragma once
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "exchange_rows.h"

namespace moebius {

// What a segment is for. All ranks of a group have to say the same. Of a rank's tokens at most `gathered` are gathered in a
// step; what is scattered of each are `width` numbers (float32).
struct ExchangeLayout {
    int ranks, tokens, top_k, gathered, width;
    size_t row_bytes;
    std::string group;
    uint64_t epoch;

    // Throws std::invalid_argument for numbers out of range.
    void check() const;
    size_t bytes() const;
    // Makes a segment of zeros one of this layout, for ranks that share so many cores.
    void write(void* segment, int cores) const;
    // Throws std::invalid_argument where the segment is none of this layout, with both told.
    void check(const void* segment, size_t bytes) const;

    // Offsets in a segment, in bytes: what a rank writes for others to read at dispatch (its counts, lists of rows, ids,
    // owners, rows), and where others write what they send home.
    size_t rank_at(int rank) const;
    size_t lists() const;
    size_t ids() const;
    size_t owners() const;
    size_t rows() const;
    size_t home() const;
    size_t rank_bytes() const;

    // The first of the columns that a rank makes of every gathered row; those of the last one end at `width`.
    int column(int rank) const;
};

// The words that ranks wait for each other by. Zeros are its first state.
struct ExchangeHeader {
    char magic[8];
    uint32_t ranks, tokens, top_k, gathered, width, cores;
    uint64_t row_bytes, epoch;
    char group[64];
    // Ranks that somebody has given up, and those of them that did not come in time. The epoch is over when the first is not 0.
    alignas(64) std::atomic<uint64_t> lost;
    std::atomic<uint64_t> late;
    // Sleepers sleep on `events`; whoever may have ended their wait counts it up, where there are any.
    alignas(64) std::atomic<uint32_t> events;
    std::atomic<uint32_t> sleepers;
    // One cache line a rank, written by that rank alone.
    struct alignas(64) Line {
        std::atomic<uint32_t> arrived;  // number of the last barrier that it reached; counts on from 0 after 2^32 - 1
        std::atomic<uint32_t> process;  // 0 until it has joined
        uint8_t doing[2];               // which operation an even and an odd barrier is part of
    } line[MOST_RANKS];

    bool all_at(uint32_t barrier) const;
    uint64_t missing_at(uint32_t barrier) const;
    void give_up(uint64_t ranks);
    PeersLost peers_lost() const;
    void wake();
};

// One rank's part. Called from one thread.
class SharedExchange {
public:
    // Joins. Throws std::invalid_argument where the rank is taken, std::bad_alloc where its part of the segment cannot be had.
    // `barrier` is what all count barriers from.
    SharedExchange(const ExchangeLayout& layout, void* segment, int rank, double timeout, uint32_t barrier = 0);
    SharedExchange(const SharedExchange&) = delete;
    SharedExchange& operator=(const SharedExchange&) = delete;

    // Every rank's values, in the order of ranks.
    std::vector<std::vector<int64_t>> agree(const std::vector<int64_t>& values);

    // moebius/parallel/exchange.py describes these operations.
    int dispatch(const Tokens& tokens, void* rows, int64_t* ids);
    void combine(const void* outputs, void* back);
    int gather(const void* x, int count, void* rows);
    void scatter(const float* parts, float* home);

    // Ends the epoch for all, at once for those who wait. From any thread.
    void give_up(uint64_t ranks) { header_.give_up(ranks); }

    const ExchangeTraffic& traffic() const { return traffic_; }

private:
    struct Received {
        int home, row;
    };

    char* at(int rank, size_t offset) const { return segment_ + layout_.rank_at(rank) + offset; }
    void begin(Doing doing);
    void meet(Doing doing);
    void wait(uint32_t barrier);
    void sleep(uint32_t barrier, Clock::time_point until);
    void write_rows(const Tokens& tokens);
    int read_rows(const Tokens& tokens, char* rows, int64_t* ids);

    const ExchangeLayout layout_;
    char* const segment_;
    ExchangeHeader& header_;
    const int rank_;
    const Clock::duration timeout_;
    Patience patience_;
    uint32_t barrier_;
    Doing second_ = NOTHING;  // what has to follow: combine dispatch, scatter gather
    int tokens_ = 0;
    std::vector<uint8_t> owners_;     // of each pair of this rank's tokens
    std::vector<int> own_rows_;       // of this rank's tokens, those that it holds an expert of
    std::vector<Received> received_;  // in the order in which they were given out
    std::vector<uint8_t> here_;       // for each pair of those, whether its expert is here
    std::vector<int> gathered_;       // how many rows came from each rank
    ExchangeTraffic traffic_;
};

}  // namespace moebius
