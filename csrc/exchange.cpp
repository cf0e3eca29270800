#include "exchange.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <new>
#include <thread>

#include "spin.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#endif

namespace moebius {
namespace {

using std::chrono::microseconds;

constexpr char MAGIC[8] = {'m', 'o', 'e', 'b', 'e', 'x', '0', '3'};
constexpr size_t LINE = 64, PAGE = 4096;

size_t rounded(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

// Of a layout, or of the header that says it.
template <class Sizes> std::string told(const std::string& group, const Sizes& sizes) {
    return "epoch " + std::to_string(sizes.epoch) + " of group " + group + ", " + std::to_string(sizes.ranks) + " ranks of " +
           std::to_string(sizes.tokens) + " tokens, " + std::to_string(sizes.top_k) + " experts a token, rows of " +
           std::to_string(sizes.row_bytes) + " bytes, " + std::to_string(sizes.gathered) + " of them gathered for " +
           std::to_string(sizes.width) + " numbers each";
}

#if defined(__linux__)
// Until the word is no longer `seen`, or a time, or for no reason. Between processes, so without FUTEX_PRIVATE_FLAG.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, std::chrono::steady_clock::time_point until) {
    const auto since = std::chrono::duration_cast<std::chrono::nanoseconds>(until.time_since_epoch()).count();
    const timespec at{time_t(since / 1000000000), long(since % 1000000000)};
    syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, seen, &at, nullptr, FUTEX_BITSET_MATCH_ANY);
}
void futex_wake_all(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }
#else
void futex_wait(std::atomic<uint32_t>&, uint32_t, std::chrono::steady_clock::time_point) { std::this_thread::sleep_for(microseconds(100)); }
void futex_wake_all(std::atomic<uint32_t>&) {}
#endif

// Gives the memory its pages, near the processor that runs this, so that no step waits for them, nor ends for want of them.
void populate(char* from, size_t bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
    if (madvise(from, bytes, MADV_POPULATE_WRITE) == 0) return;
    if (errno != EINVAL) throw std::bad_alloc();  // else the kernel is older than 5.14
#endif
    for (size_t i = 0; i < bytes; i += PAGE) *static_cast<volatile char*>(from + i) = 0;
}

}  // namespace

// --- the layout: the header, then for each rank, from a page of its own on, the parts that ExchangeLayout names ---

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free, "a lock would be a process's own");

constexpr size_t AGREED_BYTES = 2 * (1 + MOST_AGREED) * sizeof(int64_t);

size_t ExchangeLayout::rank_at(int rank) const { return rounded(sizeof(ExchangeHeader), PAGE) + rank * rank_bytes(); }
size_t ExchangeLayout::lists() const { return rounded(AGREED_BYTES, LINE); }
size_t ExchangeLayout::ids() const { return rounded(lists() + sizeof(int32_t) * ranks * (size_t(tokens) + 1), LINE); }
size_t ExchangeLayout::owners() const { return ids() + sizeof(int64_t) * (1 + size_t(tokens) * top_k); }
size_t ExchangeLayout::rows() const { return rounded(owners() + size_t(tokens) * top_k, LINE); }
size_t ExchangeLayout::home() const { return rounded(rows() + tokens * row_bytes, PAGE); }
size_t ExchangeLayout::rank_bytes() const {
    return rounded(home() + std::max(size_t(tokens) * top_k * row_bytes, size_t(gathered) * width * sizeof(float)), PAGE);
}
size_t ExchangeLayout::bytes() const { return rank_at(ranks); }

// ExchangeSpec.columns says the same.
int ExchangeLayout::column(int rank) const {
    constexpr int ALIGNED = LINE / sizeof(float);
    return rank == ranks ? width : int(int64_t(width) * rank / ranks) / ALIGNED * ALIGNED;
}

void ExchangeLayout::check() const {
    if (ranks < 1 || ranks > MOST_RANKS)
        throw std::invalid_argument("a group of " + std::to_string(ranks) + " ranks; through shared memory there are 1 to " +
                                    std::to_string(MOST_RANKS));
    if (group.empty() || group.size() >= sizeof(ExchangeHeader::group))
        throw std::invalid_argument("a group's name of " + std::to_string(group.size()) + " bytes; it must have 1 to " +
                                    std::to_string(sizeof(ExchangeHeader::group) - 1));
    if (tokens < 1 || top_k < 1 || row_bytes < 1) throw std::invalid_argument("an exchange of no tokens, no experts or no bytes");
    if (gathered < 0 || gathered > tokens || width < 0) throw std::invalid_argument("more rows are gathered than there are, or of no width");
}

void ExchangeLayout::write(void* segment, int cores) const {
    check();
    auto* header = new (segment) ExchangeHeader();
    header->ranks = ranks, header->tokens = tokens, header->top_k = top_k, header->cores = cores;
    header->gathered = gathered, header->width = width;
    header->row_bytes = row_bytes, header->epoch = epoch;
    std::copy(group.begin(), group.end(), header->group);
    std::copy(std::begin(MAGIC), std::end(MAGIC), header->magic);
}

void ExchangeLayout::check(const void* segment, size_t segment_bytes) const {
    check();
    const auto& found = *static_cast<const ExchangeHeader*>(segment);
    if (segment_bytes < sizeof(ExchangeHeader) || std::memcmp(found.magic, MAGIC, sizeof(MAGIC)))
        throw std::invalid_argument("this memory is no segment of an exchange, or another version's");
    const std::string found_group(found.group, strnlen(found.group, sizeof(found.group)));
    const std::string theirs = told(found_group, found);
    const std::string ours = told(group, *this);
    if (theirs != ours) throw std::invalid_argument("the segment is for " + theirs + "; this rank is for " + ours);
    if (segment_bytes < bytes()) throw std::invalid_argument("the segment is cut short");
}

// --- the barrier. All of its atomic operations are sequentially consistent ---

uint64_t ExchangeHeader::missing_at(uint32_t barrier) const {
    uint64_t missing = 0;
    for (uint32_t r = 0; r < ranks; r++)
        if (int32_t(line[r].arrived.load() - barrier) < 0) missing |= bit(r);
    return missing;
}

bool ExchangeHeader::all_at(uint32_t barrier) const {
    for (uint32_t r = 0; r < ranks; r++)
        if (int32_t(line[r].arrived.load() - barrier) < 0) return false;
    return true;
}

void ExchangeHeader::give_up(uint64_t given_up) {
    lost.fetch_or(given_up);
    wake();
}

PeersLost ExchangeHeader::peers_lost() const {
    const uint64_t ranks = lost.load();
    return PeersLost(ranks, ranks & late.load() ? Fault::LATE : Fault::GONE);
}

// For whoever has just made a sleeper's condition true. A sleeper counts itself, reads `events`, looks at its condition and
// only then sleeps, unless `events` has changed. In the one order of all these operations either its counting comes before
// our look at `sleepers`, and we change `events`; or after it, and then its look at the condition finds it true.
void ExchangeHeader::wake() {
    if (sleepers.load() == 0) return;
    events.fetch_add(1);
    futex_wake_all(events);
}

void SharedExchange::begin(Doing doing) {
    const Doing expected = doing == COMBINE || doing == SCATTER ? doing : NOTHING;
    if (second_ != expected) throw std::logic_error("combine follows dispatch, scatter follows gather, and nothing else does");
    if (header_.lost.load()) throw header_.peers_lost();
}

void SharedExchange::meet(Doing doing) {
    const uint32_t barrier = ++barrier_;
    ExchangeHeader::Line& mine = header_.line[rank_];
    mine.doing[barrier % 2] = doing;
    mine.arrived.store(barrier);
    traffic_.calls++;
    // Of those that arrive last at once, at least one sees that all are here, and wakes who sleeps.
    if (header_.all_at(barrier)) header_.wake();
    else wait(barrier);
    for (int r = 0; r < layout_.ranks; r++)
        if (header_.line[r].doing[barrier % 2] != doing) {
            header_.give_up(bit(r));
            throw PeersLost(bit(r), Fault::OUT_OF_STEP);
        }
}

void SharedExchange::wait(uint32_t barrier) {
    const auto from = Clock::now();
    const auto until = from + timeout_;
    auto now = from;
    for (int turn = 1; !header_.all_at(barrier); turn++) {
        // Who has left may have arrived before: its arrival, if any, can be seen after this.
        if (header_.lost.load() && !header_.all_at(barrier)) throw header_.peers_lost();
        if (now >= until) {
            const uint64_t missing = header_.missing_at(barrier);
            if (!missing) break;
            header_.late.fetch_or(missing);
            header_.give_up(missing);
            throw header_.peers_lost();
        }
        switch (patience_.turn(now - from)) {
            case Patience::LOOK:
                pause();
                if (turn % 32) continue;
                break;
            case Patience::YIELD: std::this_thread::yield(); break;
            case Patience::SLEEP: sleep(barrier, until);
        }
        now = Clock::now();
    }
    const auto waited = Clock::now() - from;
    traffic_.seconds_waited += std::chrono::duration<double>(waited).count();
    patience_.learn(waited);
}

void SharedExchange::sleep(uint32_t barrier, Clock::time_point until) {
    // A rank that is killed in here stays counted: then others make a call to the kernel in vain.
    header_.sleepers.fetch_add(1);
    const uint32_t seen = header_.events.load();
    if (!header_.all_at(barrier) && !header_.lost.load()) futex_wait(header_.events, seen, until);
    header_.sleepers.fetch_sub(1);
}

// --- the operations ---

SharedExchange::SharedExchange(const ExchangeLayout& layout, void* segment, int rank, double timeout, uint32_t barrier)
    : layout_(layout), segment_(static_cast<char*>(segment)), header_(*static_cast<ExchangeHeader*>(segment)), rank_(rank),
      timeout_(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(timeout, 1e6)))), patience_(header_.ranks > header_.cores), barrier_(barrier) {
    if (rank < 0 || rank >= layout.ranks) throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(layout.ranks));
    uint32_t process = 0;
    if (!header_.line[rank].process.compare_exchange_strong(process, uint32_t(getpid())))
        throw std::invalid_argument("rank " + std::to_string(rank) + " has joined already, as process " + std::to_string(process));
    populate(at(rank, 0), layout.rank_bytes());
    const size_t most = size_t(layout.ranks) * layout.tokens;
    owners_.resize(size_t(layout.tokens) * layout.top_k);
    own_rows_.reserve(layout.tokens);
    received_.reserve(most);
    here_.reserve(most * layout.top_k);
}

std::vector<std::vector<int64_t>> SharedExchange::agree(const std::vector<int64_t>& values) {
    if (values.size() > MOST_AGREED) throw std::invalid_argument("more values than ranks can agree on");
    begin(AGREE);
    const size_t copy = (barrier_ + 1) % 2 * (1 + MOST_AGREED);
    auto of = [&](int r) { return reinterpret_cast<int64_t*>(at(r, 0)) + copy; };
    int64_t* mine = of(rank_);
    mine[0] = int64_t(values.size());
    std::copy(values.begin(), values.end(), mine + 1);
    meet(AGREE);
    std::vector<std::vector<int64_t>> all;
    for (int r = 0; r < layout_.ranks; r++) {
        const int64_t* theirs = of(r);
        all.emplace_back(theirs + 1, theirs + 1 + std::clamp<int64_t>(theirs[0], 0, MOST_AGREED));
    }
    return all;
}

int SharedExchange::dispatch(const Tokens& tokens, void* rows, int64_t* ids) {
    begin(DISPATCH);
    if (tokens.count > layout_.tokens) throw std::invalid_argument("more tokens than the segment has memory for");
    write_rows(tokens);
    meet(DISPATCH);
    second_ = COMBINE;
    return read_rows(tokens, static_cast<char*>(rows), ids);
}

// A row that others need is written once, however many they are, at its own place; a list for each rank says which are
// for it.
void SharedExchange::write_rows(const Tokens& tokens) {
    const int top_k = layout_.top_k;
    auto* counts = reinterpret_cast<int32_t*>(at(rank_, layout_.lists()));
    std::fill_n(counts, layout_.ranks, 0);
    own_rows_.clear();
    tokens_ = tokens.count;
    for (int t = 0; t < tokens.count; t++) {
        uint64_t needed = find_owners(tokens, t, top_k, layout_.ranks, &owners_[size_t(t) * top_k]);
        if (needed & bit(rank_)) own_rows_.push_back(t);
        needed &= ~bit(rank_);
        if (!needed) continue;
        std::memcpy(at(rank_, layout_.rows()) + t * layout_.row_bytes, static_cast<const char*>(tokens.x) + t * layout_.row_bytes,
                    layout_.row_bytes);
        for (int r = 0; r < layout_.ranks; r++)
            if (needed & bit(r)) {
                counts[layout_.ranks + size_t(r) * layout_.tokens + counts[r]++] = t;
                traffic_.bytes_out += layout_.row_bytes;
            }
    }
    const size_t pairs = size_t(tokens.count) * top_k;
    std::copy_n(tokens.ids, pairs, reinterpret_cast<int64_t*>(at(rank_, layout_.ids())));
    std::copy_n(owners_.data(), pairs, reinterpret_cast<uint8_t*>(at(rank_, layout_.owners())));
}

int SharedExchange::read_rows(const Tokens& tokens, char* rows, int64_t* ids) {
    received_.clear();
    here_.clear();
    const int top_k = layout_.top_k;
    auto take = [&](int home, int row, const char* x, const int64_t* home_ids, const uint8_t* home_owners) {
        const size_t place = received_.size();
        std::memcpy(rows + place * layout_.row_bytes, x + row * layout_.row_bytes, layout_.row_bytes);
        for (int k = 0; k < top_k; k++) {
            const size_t pair = size_t(row) * top_k + k;
            const bool here = home_owners[pair] == rank_;
            ids[place * top_k + k] = here ? home_ids[pair] : tokens.experts;
            here_.push_back(here);
        }
        received_.push_back({home, row});
    };
    for (int home = 0; home < layout_.ranks; home++) {
        if (home == rank_) {
            for (int row : own_rows_) take(home, row, static_cast<const char*>(tokens.x), tokens.ids, owners_.data());
            continue;
        }
        const auto* counts = reinterpret_cast<const int32_t*>(at(home, layout_.lists()));
        const int32_t* list = counts + layout_.ranks + size_t(rank_) * layout_.tokens;
        for (int i = 0; i < std::min(counts[rank_], layout_.tokens); i++) {
            take(home, std::clamp(list[i], 0, layout_.tokens - 1), at(home, layout_.rows()),
                 reinterpret_cast<const int64_t*>(at(home, layout_.ids())), reinterpret_cast<const uint8_t*>(at(home, layout_.owners())));
            traffic_.bytes_in += layout_.row_bytes;
        }
    }
    return int(received_.size());
}

void SharedExchange::combine(const void* outputs, void* back) {
    begin(COMBINE);
    const int top_k = layout_.top_k;
    const size_t row_bytes = layout_.row_bytes;
    for (size_t r = 0; r < received_.size(); r++) {
        const Received from = received_[r];
        const bool own = from.home == rank_;
        char* home = own ? static_cast<char*>(back) : at(from.home, layout_.home());
        for_each_run(here_.data() + r * top_k, top_k, [&](uint8_t here, size_t first, size_t count) {
            if (!here) return;
            std::memcpy(home + (size_t(from.row) * top_k + first) * row_bytes,
                        static_cast<const char*>(outputs) + (r * top_k + first) * row_bytes, count * row_bytes);
            if (!own) traffic_.bytes_out += count * row_bytes;
        });
    }
    meet(COMBINE);
    second_ = NOTHING;
    const char* home = at(rank_, layout_.home());
    for_each_run(owners_.data(), size_t(tokens_) * top_k, [&](uint8_t owner, size_t first, size_t count) {
        if (owner == rank_) return;
        std::memcpy(static_cast<char*>(back) + first * row_bytes, home + first * row_bytes, count * row_bytes);
        traffic_.bytes_in += count * row_bytes;
    });
}

int SharedExchange::gather(const void* x, int count, void* rows) {
    begin(GATHER);
    if (count < 0 || count > layout_.gathered) throw std::invalid_argument("more rows than the segment gathers");
    const size_t row_bytes = layout_.row_bytes;
    reinterpret_cast<int32_t*>(at(rank_, layout_.lists()))[0] = count;
    if (count) std::memcpy(at(rank_, layout_.rows()), x, count * row_bytes);
    traffic_.bytes_out += (layout_.ranks - 1) * count * row_bytes;
    meet(GATHER);
    second_ = SCATTER;
    gathered_.clear();
    int total = 0;
    for (int home = 0; home < layout_.ranks; home++) {
        const int found = std::clamp(reinterpret_cast<const int32_t*>(at(home, layout_.lists()))[0], 0, layout_.gathered);
        if (found) std::memcpy(static_cast<char*>(rows) + total * row_bytes, at(home, layout_.rows()), found * row_bytes);
        if (home != rank_) traffic_.bytes_in += found * row_bytes;
        gathered_.push_back(found);
        total += found;
    }
    return total;
}

void SharedExchange::scatter(const float* parts, float* back) {
    begin(SCATTER);
    const size_t width = layout_.width, first = layout_.column(rank_), stop = layout_.column(rank_ + 1);
    for (int home = 0; home < layout_.ranks; home++) {
        float* to = home == rank_ ? back : reinterpret_cast<float*>(at(home, layout_.home()));
        for (int row = 0; row < gathered_[home]; row++, parts += stop - first)
            std::memcpy(to + row * width + first, parts, (stop - first) * sizeof(float));
        if (home != rank_) traffic_.bytes_out += gathered_[home] * (stop - first) * sizeof(float);
    }
    meet(SCATTER);
    second_ = NOTHING;
    const float* home = reinterpret_cast<const float*>(at(rank_, layout_.home()));
    for (size_t row = 0; row < size_t(gathered_[rank_]); row++) {
        std::memcpy(back + row * width, home + row * width, first * sizeof(float));
        std::memcpy(back + row * width + stop, home + row * width + stop, (width - stop) * sizeof(float));
        traffic_.bytes_in += (width - (stop - first)) * sizeof(float);
    }
}

}  // namespace moebius
