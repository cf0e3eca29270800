// How ranks of several hosts trade the rows of a step's tokens: each has a connection to each other one, and each operation is
// one message to every rank and one from every rank. A message says which operation it is of, so that ranks that are out of step
// notice, and how many rows follow; nobody has to be told that by a message of its own.
//
// All sending and receiving of an operation goes on side by side, in whatever order the connections take and give it, so that no
// two ranks wait for each other with full connections. Rows are sent from where they are and received where they belong.
//
// Between ranks of one host bytes go through memory, two rings for each two of them. Their connection remains: a byte in it
// wakes who sleeps, and its end says that the other has left.
#pragma once
#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "exchange_rows.h"
#include "ring.h"

namespace moebius {

// One rank's part. Called from one thread.
class SocketExchange {
public:
    struct Sizes {
        int ranks, tokens, top_k;
        size_t row_bytes;
    };

    // Owns the connected stream sockets from now on, one a rank, of which this rank's own is not looked at. `rings` are
    // memory that is shared with a rank of this host, or null: the first ring is the lower rank's to write. Throws
    // std::invalid_argument for numbers out of range.
    SocketExchange(const Sizes& sizes, int rank, const std::vector<int>& sockets, const std::vector<Ring*>& rings, bool crowded,
                   double timeout);
    ~SocketExchange();
    SocketExchange(const SocketExchange&) = delete;
    SocketExchange& operator=(const SocketExchange&) = delete;

    // Every rank's values, in the order of ranks.
    std::vector<std::vector<int64_t>> agree(const std::vector<int64_t>& values);

    // moebius/parallel/exchange.py describes both operations.
    int dispatch(const Tokens& tokens, void* rows, int64_t* ids);
    void combine(const void* outputs, void* back);

    // Ends the epoch because of these ranks, at once for those who wait, here and at the others. From any thread.
    void give_up(uint64_t ranks);

    const ExchangeTraffic& traffic() const { return traffic_; }

private:
    struct Header {
        uint32_t doing, call;
        uint64_t count;
    };

    // Pieces of memory, of which some bytes have gone out or come in.
    class Pieces {
    public:
        void clear() { list_.clear(), next_ = 0; }
        void add(const void* from, size_t bytes);
        bool left() const { return next_ < list_.size(); }
        iovec* next() { return &list_[next_]; }
        size_t count() const { return list_.size() - next_; }
        void advance(size_t bytes);

    private:
        std::vector<iovec> list_;
        size_t next_ = 0;
    };

    struct Peer {
        int socket = -1;
        Ring *to = nullptr, *from = nullptr;  // what bytes go through, where that is not the socket
        bool ended = false;                   // its connection, where bytes go through rings
        Header sent, found;
        Pieces out, in;
        bool told;                    // its header is here
        std::vector<int64_t> values;  // of agree, received
        std::vector<int32_t> ids_out, ids_in;  // of dispatch: a row's choices, with the number after the last expert elsewhere
        std::vector<int> rows;        // of dispatch: those of this rank's tokens that go there
        size_t pairs_there = 0;       // how many pairs of this rank's tokens are computed there
        size_t place = 0;             // of its rows, and for its own rank's, among the received ones
        size_t count = 0;             // of its rows
    };

    void begin(Doing doing);
    void open(Doing doing, int rank, uint64_t count);
    template <class OnHeader, class OnAll> void trade(Doing doing, const OnHeader& on_header, const OnAll& on_all);
    template <class OnHeader> bool move(Doing doing, const OnHeader& on_header);
    void check_header(Doing doing, int rank);
    bool send(int rank);
    bool receive(int rank);
    uint64_t unfinished() const;
    void sleep(Clock::time_point until);
    bool may_go_on() const;
    static void wake(const Peer& peer, std::atomic<uint32_t>& sleeps);
    static void hear(Peer& peer);
    [[noreturn]] void lose(uint64_t ranks, Fault fault);
    void split(const Tokens& tokens);
    void take(const Tokens& tokens, char* rows, int64_t* ids);

    const Sizes sizes_;
    const int rank_;
    const Clock::duration timeout_;
    Patience patience_;
    std::vector<Peer> peers_;
    std::atomic<uint64_t> lost_{0};
    uint32_t call_ = 0;
    bool combine_next_ = false;
    int tokens_ = 0;
    std::vector<uint8_t> owners_;  // of each pair of this rank's tokens
    std::vector<uint8_t> here_;    // for each pair of the received rows, whether its expert is here
    ExchangeTraffic traffic_;
};

}  // namespace moebius
