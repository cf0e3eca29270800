// The exchanges through shared memory and through sockets between threads, each of which is a rank: random steps against plain
// loops, and what happens when a rank does not come. Threads, so that a sanitizer sees both sides of every access.
//
//   cmake -S . -B build/thread -DMOEBIUS_TESTS=ON -DMOEBIUS_SANITIZERS=thread
//   cmake --build build/thread --target test_exchange && build/thread/test_exchange
#include <sys/socket.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <type_traits>

#include "exchange.h"
#include "socket_exchange.h"

using namespace moebius;

namespace {

void require(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "FAILED: %s\n", what);
    std::abort();
}

struct Memory {
    explicit Memory(const ExchangeLayout& layout, int cores = 64) : bytes(layout.bytes()), at(std::aligned_alloc(4096, bytes), std::free) {
        std::memset(at.get(), 0, bytes);
        layout.write(at.get(), cores);
        layout.check(at.get(), bytes);
    }
    size_t bytes;
    std::unique_ptr<void, decltype(&std::free)> at;
};

// A layer's tokens of all ranks, the same in each thread, drawn by its number. Rows are of 4-byte numbers.
struct Layer {
    Layer(const ExchangeLayout& layout, int number) : width(int(layout.row_bytes / 4)), top_k(layout.top_k) {
        std::mt19937 random(number);
        auto below = [&](int n) { return int(random() % n); };
        experts = top_k + below(6);
        splits = 1 + below(3);
        for (int i = 0; i < splits * experts; i++) owners.push_back(below(layout.ranks));
        for (int r = 0; r < layout.ranks; r++) {
            const int count = below(3) ? below(layout.tokens + 1) : 0;
            counts.push_back(count);
            x.emplace_back();
            ids.emplace_back();
            for (int i = 0; i < count * width; i++) x[r].push_back(random());
            for (int t = 0; t < count; t++) {
                const int first = below(experts);
                for (int k = 0; k < top_k; k++) ids[r].push_back((first + k) % experts);
            }
        }
    }
    int owner(int home, int pair) const { return owners[(pair / top_k % splits) * experts + ids[home][pair]]; }

    int width, top_k, experts, splits;
    std::vector<int32_t> owners;
    std::vector<int> counts;
    std::vector<std::vector<uint32_t>> x;
    std::vector<std::vector<int64_t>> ids;
};

uint32_t output(uint32_t x, int64_t expert) { return x * 3 + 7 * uint32_t(expert); }

template <class Exchange> void check_layer(Exchange& exchange, const ExchangeLayout& layout, const Layer& layer, int rank) {
    const int width = layer.width, top_k = layer.top_k;
    std::vector<uint32_t> want_rows, outputs, back(size_t(layer.counts[rank]) * top_k * width);
    std::vector<int64_t> want_ids;
    for (int home = 0; home < layout.ranks; home++)
        for (int t = 0; t < layer.counts[home]; t++) {
            std::vector<int64_t> ids;
            bool any = false;
            for (int k = 0; k < top_k; k++) {
                const bool here = layer.owner(home, t * top_k + k) == rank;
                ids.push_back(here ? layer.ids[home][t * top_k + k] : layer.experts);
                any |= here;
            }
            if (!any) continue;
            want_ids.insert(want_ids.end(), ids.begin(), ids.end());
            want_rows.insert(want_rows.end(), layer.x[home].begin() + t * width, layer.x[home].begin() + (t + 1) * width);
        }
    const int want = int(want_ids.size()) / top_k;
    // Exactly as large as they have to be, so that writing one element too many is found.
    std::vector<uint32_t> rows(size_t(want) * width);
    std::vector<int64_t> ids(size_t(want) * top_k);
    const int received = exchange.dispatch({layer.x[rank].data(), layer.ids[rank].data(), layer.counts[rank], layer.owners.data(), layer.splits,
                                            layer.experts}, rows.data(), ids.data());
    require(received == want && rows == want_rows && ids == want_ids, "dispatch gives the rows in order");
    for (int pair = 0; pair < want * top_k; pair++)
        for (int i = 0; i < width; i++) outputs.push_back(output(rows[size_t(pair / top_k) * width + i], ids[pair]));
    exchange.combine(outputs.data(), back.data());
    for (size_t i = 0; i < back.size(); i++) {
        const size_t pair = i / width;
        require(back[i] == output(layer.x[rank][pair / top_k * width + i % width], layer.ids[rank][pair]), "combine brings all pairs home");
    }
}

// Rows of any number at each rank; rank r makes of number x of a row, for its column c, x + c.
void check_gathering(SharedExchange& exchange, const ExchangeLayout& layout, int number, int rank) {
    const int numbers = int(layout.row_bytes / 4);
    const auto count = [&](int home) { return (number + 3 * home) % (layout.gathered + 1); };
    const auto x = [&](int home, int row) { return float(1000 * (number % 7) + 100 * home + 10 * row); };
    std::vector<float> own, want, parts;
    for (int home = 0; home < layout.ranks; home++)
        for (int row = 0; row < count(home); row++) {
            for (int i = 0; i < numbers; i++) want.push_back(x(home, row) + float(i));
            if (home == rank) own.insert(own.end(), want.end() - numbers, want.end());
            for (int c = layout.column(rank); c < layout.column(rank + 1); c++) parts.push_back(x(home, row) + c);
        }
    std::vector<float> rows(want.size()), back(size_t(count(rank)) * layout.width);
    const int gathered = exchange.gather(own.data(), count(rank), rows.data());
    require(size_t(gathered) * numbers == want.size() && rows == want, "gather gives all rows in order");
    exchange.scatter(parts.data(), back.data());
    for (size_t i = 0; i < back.size(); i++)
        require(back[i] == x(rank, int(i) / layout.width) + float(int(i) % layout.width), "scatter brings all columns home");
}

void run_ranks(int count, const std::function<void(int)>& body) {
    std::vector<std::thread> threads;
    for (int r = 0; r < count; r++) threads.emplace_back(body, r);
    for (std::thread& thread : threads) thread.join();
}

template <class Exchange> void check_steps(Exchange& exchange, const ExchangeLayout& layout, int layers, int rank) {
    for (int number = 0; number < layers; number++) {
        const auto agreed = exchange.agree({number, rank});
        for (int r = 0; r < layout.ranks; r++) require(agreed[r] == std::vector<int64_t>{number, r}, "agree gives all values");
        // Some ranks come late, so that others spin, yield and sleep.
        if (number % 16 == rank) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        check_layer(exchange, layout, Layer(layout, number), rank);
        if constexpr (std::is_same_v<Exchange, SharedExchange>) check_gathering(exchange, layout, number, rank);
    }
}

void test_steps(int ranks, int layers, int cores) {
    const ExchangeLayout layout{ranks, 5, 3, 4, 70, 12, "test", 1};
    Memory memory(layout, cores);
    run_ranks(ranks, [&](int rank) {
        SharedExchange exchange(layout, memory.at.get(), rank, 60);
        check_steps(exchange, layout, layers, rank);
    });
}

template <class Body> PeersLost lost(const Body& body) {
    try {
        body();
    } catch (const PeersLost& error) {
        return error;
    }
    require(false, "a rank that does not come is noticed");
    std::abort();
}

void test_a_rank_that_does_not_come() {
    const ExchangeLayout layout{3, 5, 3, 4, 70, 12, "test", 1};
    Memory memory(layout);
    run_ranks(3, [&](int rank) {
        SharedExchange exchange(layout, memory.at.get(), rank, 3);
        exchange.agree({});
        if (rank == 1) return;
        const PeersLost late = lost([&] { exchange.agree({}); });
        require(late.ranks == 2 && late.fault == Fault::LATE, "it is named");
        const PeersLost again = lost([&] { exchange.agree({}); });
        require(again.ranks == 2 && again.fault == Fault::LATE, "and later again");
    });
}

void test_a_rank_that_leaves_and_one_that_is_given_up() {
    const ExchangeLayout layout{3, 5, 3, 4, 70, 12, "test", 1};
    for (bool given_up : {false, true}) {
        Memory memory(layout);
        auto* header = static_cast<ExchangeHeader*>(memory.at.get());
        run_ranks(3, [&](int rank) {
            SharedExchange exchange(layout, memory.at.get(), rank, 600);
            exchange.agree({});
            if (rank == 1) {
                std::this_thread::sleep_for(std::chrono::milliseconds(5));
                if (given_up) header->give_up(2);
                else exchange.give_up(2);
            } else require(lost([&] { exchange.agree({}); }).ranks == 2, "those who wait learn of it at once");
        });
    }
}

void test_out_of_step() {
    const ExchangeLayout layout{2, 5, 3, 4, 70, 12, "test", 1};
    Memory memory(layout);
    run_ranks(2, [&](int rank) {
        SharedExchange exchange(layout, memory.at.get(), rank, 60);
        const PeersLost error = lost([&] {
            if (rank) exchange.agree({});
            else check_layer(exchange, layout, Layer(layout, 1), rank);
        });
        require(error.fault == Fault::OUT_OF_STEP, "ranks out of step notice");
    });
}

// A segment's counter is near its end after some days: barriers go on past it.
void test_barriers_count_on() {
    const ExchangeLayout layout{2, 5, 3, 4, 70, 12, "test", 1};
    Memory memory(layout);
    constexpr uint32_t start = UINT32_MAX - 5;
    for (int r = 0; r < 2; r++) static_cast<ExchangeHeader*>(memory.at.get())->line[r].arrived = start;
    run_ranks(2, [&](int rank) {
        SharedExchange exchange(layout, memory.at.get(), rank, 60, start);
        for (int number = 0; number < 20; number++) check_layer(exchange, layout, Layer(layout, number), rank);
    });
}

// --- through sockets ---

using Sockets = std::vector<std::vector<int>>;  // [rank][other rank]

// Memory between ranks of one host: of each two of the first `near`.
struct Rings {
    Rings(int ranks, int near) : pairs(size_t(ranks) * ranks) {
        for (int a = 0; a < near; a++)
            for (int b = a + 1; b < near; b++) pairs[a * ranks + b] = std::make_unique<std::array<Ring, 2>>();
    }
    std::vector<Ring*> of(int rank, int ranks) const {
        std::vector<Ring*> found;
        for (int other = 0; other < ranks; other++) {
            const auto& pair = pairs[std::min(rank, other) * ranks + std::max(rank, other)];
            found.push_back(pair ? pair->data() : nullptr);
        }
        return found;
    }
    std::vector<std::unique_ptr<std::array<Ring, 2>>> pairs;
};

// Connections that hold little, so that ranks have to receive while they send.
Sockets connected(int ranks) {
    Sockets sockets(ranks, std::vector<int>(ranks, -1));
    for (int a = 0; a < ranks; a++)
        for (int b = a + 1; b < ranks; b++) {
            int ends[2];
            require(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "a pair of sockets");
            const int bytes = 1;  // the kernel's least
            for (int end : ends) setsockopt(end, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
            sockets[a][b] = ends[0], sockets[b][a] = ends[1];
        }
    return sockets;
}

void run_sockets(const ExchangeLayout& layout, double timeout, bool crowded, int near, const std::function<void(SocketExchange&, int)>& body) {
    const Sockets sockets = connected(layout.ranks);
    const Rings rings(layout.ranks, near);
    std::vector<std::unique_ptr<SocketExchange>> exchanges;
    for (int r = 0; r < layout.ranks; r++)
        exchanges.push_back(std::make_unique<SocketExchange>(
            SocketExchange::Sizes{layout.ranks, layout.tokens, layout.top_k, layout.row_bytes}, r, sockets[r], rings.of(r, layout.ranks), crowded, timeout));
    run_ranks(layout.ranks, [&](int rank) { body(*exchanges[rank], rank); });
}

void test_sockets_steps(int ranks, int layers, bool crowded, int numbers, int near) {
    const ExchangeLayout layout{ranks, 5, 3, 4, 70, sizeof(uint32_t) * size_t(numbers), "test", 1};
    run_sockets(layout, 60, crowded, near, [&](SocketExchange& exchange, int rank) { check_steps(exchange, layout, layers, rank); });
}

void test_sockets_when_a_rank_does_not_come(int near) {
    const ExchangeLayout layout{3, 5, 3, 4, 70, 12, "test", 1};
    run_sockets(layout, 3, false, near, [&](SocketExchange& exchange, int rank) {
        exchange.agree({});
        if (rank == 1) return;
        const PeersLost error = lost([&] { exchange.agree({}); });
        require(error.ranks == 2 && error.fault == Fault::LATE, "it is named");
        require(lost([&] { exchange.agree({}); }).ranks == 2, "and later again");
    });
}

void test_sockets_when_a_rank_leaves(int near) {
    const ExchangeLayout layout{3, 5, 3, 4, 70, 12, "test", 1};
    run_sockets(layout, 600, false, near, [&](SocketExchange& exchange, int rank) {
        exchange.agree({});
        if (rank == 1) {
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
            exchange.give_up(2);
        } else {
            const PeersLost error = lost([&] { exchange.agree({}); });
            require(error.ranks == 2 && error.fault == Fault::LEFT, "those who wait learn of it at once");
        }
    });
}

void test_sockets_when_another_thread_gives_up(int near) {
    const ExchangeLayout layout{2, 5, 3, 4, 70, 12, "test", 1};
    run_sockets(layout, 600, false, near, [&](SocketExchange& exchange, int rank) {
        if (rank == 1) return;
        std::thread other([&] {
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
            exchange.give_up(2);
        });
        const PeersLost error = lost([&] { exchange.agree({}); });
        require(error.ranks == 2 && error.fault == Fault::GONE, "who waits ends at once");
        other.join();
    });
}

void test_sockets_out_of_step(int near) {
    const ExchangeLayout layout{2, 5, 3, 4, 70, 12, "test", 1};
    run_sockets(layout, 60, false, near, [&](SocketExchange& exchange, int rank) {
        const PeersLost error = lost([&] {
            if (rank) exchange.agree({});
            else check_layer(exchange, layout, Layer(layout, 1), rank);
        });
        require(error.fault == Fault::OUT_OF_STEP, "ranks out of step notice");
    });
}

}  // namespace

int main() {
    for (int ranks = 1; ranks <= 4; ranks++)
        for (int cores : {1, 64}) test_steps(ranks, 200, cores);
    test_a_rank_that_does_not_come();
    test_a_rank_that_leaves_and_one_that_is_given_up();
    test_out_of_step();
    test_barriers_count_on();
    // Nobody shares memory, some do, all do.
    for (int near : {0, 2, 4}) {
        for (int ranks = 1; ranks <= 4; ranks++)
            for (bool crowded : {false, true}) test_sockets_steps(ranks, 100, crowded, 3, std::min(near, ranks));
        near = std::min(near, 2);
        test_sockets_when_another_thread_gives_up(near);
        test_sockets_out_of_step(near);
    }
    for (int near : {0, 2, 3}) {
        test_sockets_steps(3, 20, false, 5000, near);
        test_sockets_when_a_rank_does_not_come(near);
        test_sockets_when_a_rank_leaves(near);
    }
    std::puts("exchange: passed");
}
