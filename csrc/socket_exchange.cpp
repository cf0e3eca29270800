#include "socket_exchange.h"

#include <limits.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <thread>

#include "spin.h"

#ifndef MSG_NOSIGNAL
#define MSG_NOSIGNAL 0
#endif

namespace moebius {
namespace {

constexpr size_t MOST_PIECES = IOV_MAX;  // that one call to the kernel takes

bool not_now(int error) { return error == EAGAIN || error == EWOULDBLOCK || error == EINTR; }

}  // namespace

void SocketExchange::Pieces::add(const void* from, size_t bytes) {
    if (bytes == 0) return;
    char* start = static_cast<char*>(const_cast<void*>(from));
    if (!list_.empty()) {
        iovec& last = list_.back();
        if (static_cast<char*>(last.iov_base) + last.iov_len == start && left()) {
            last.iov_len += bytes;
            return;
        }
    }
    list_.push_back({start, bytes});
}

void SocketExchange::Pieces::advance(size_t bytes) {
    while (bytes) {
        iovec& piece = list_[next_];
        const size_t part = std::min(bytes, piece.iov_len);
        piece.iov_base = static_cast<char*>(piece.iov_base) + part;
        piece.iov_len -= part;
        bytes -= part;
        if (piece.iov_len == 0) next_++;
    }
}

SocketExchange::SocketExchange(const Sizes& sizes, int rank, const std::vector<int>& sockets, const std::vector<Ring*>& rings, bool crowded,
                               double timeout)
    : sizes_(sizes), rank_(rank),
      timeout_(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::min(timeout, 1e6)))), patience_(crowded) {
    if (sizes.ranks < 1 || sizes.ranks > MOST_RANKS)
        throw std::invalid_argument("a group of " + std::to_string(sizes.ranks) + " ranks; there may be 1 to " + std::to_string(MOST_RANKS));
    if (rank < 0 || rank >= sizes.ranks || sockets.size() != size_t(sizes.ranks) || rings.size() != sockets.size())
        throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(sizes.ranks) + " with " +
                                    std::to_string(sockets.size()) + " connections");
    if (sizes.tokens < 1 || sizes.top_k < 1 || sizes.row_bytes < 1) throw std::invalid_argument("an exchange of no tokens, no experts or no bytes");
    peers_.resize(sizes.ranks);
    owners_.resize(size_t(sizes.tokens) * sizes.top_k);
    here_.reserve(size_t(sizes.ranks) * sizes.tokens * sizes.top_k);
    for (int r = 0; r < sizes.ranks; r++) {
        if (r == rank) continue;
        peers_[r].socket = sockets[r];
        if (rings[r]) peers_[r].to = rings[r] + (rank > r), peers_[r].from = rings[r] + (rank < r);
    }
}

SocketExchange::~SocketExchange() {
    for (const Peer& peer : peers_)
        if (peer.socket >= 0) close(peer.socket);
}

void SocketExchange::give_up(uint64_t ranks) {
    lost_.fetch_or(ranks);
    // Wakes who waits, here and there. Closing is left to the end of all calls: the numbers might be another's by then.
    for (const Peer& peer : peers_)
        if (peer.socket >= 0) shutdown(peer.socket, SHUT_RDWR);
}

void SocketExchange::lose(uint64_t ranks, Fault fault) {
    // Who was given up meanwhile is why connections end.
    const uint64_t given_up = lost_.load();
    if (given_up) throw PeersLost(given_up, Fault::GONE);
    lost_.fetch_or(ranks);
    throw PeersLost(ranks, fault);
}

// --- one operation: a message to and from every other rank ---

void SocketExchange::begin(Doing doing) {
    if (combine_next_ != (doing == COMBINE)) throw std::logic_error("combine follows dispatch, and nothing else does");
    if (uint64_t lost = lost_.load()) throw PeersLost(lost, Fault::GONE);
}

// A message to a rank begins, and one of it is expected.
void SocketExchange::open(Doing doing, int rank, uint64_t count) {
    Peer& peer = peers_[rank];
    peer.told = false;
    peer.sent = {doing, call_, count};
    peer.out.clear();
    peer.out.add(&peer.sent, sizeof(Header));
    peer.in.clear();
    peer.in.add(&peer.found, sizeof(Header));
}

// Until all has gone out and come in. `on_header(rank)` says where what follows a header goes; `on_all` is called when all
// headers are here.
template <class OnHeader, class OnAll> void SocketExchange::trade(Doing doing, const OnHeader& on_header, const OnAll& on_all) {
    traffic_.calls++;
    const auto until = Clock::now() + timeout_;
    Clock::time_point idle_since;
    bool idle = false, all_told = false;
    Clock::duration waited{0};
    while (true) {
        const bool moved = move(doing, on_header);
        if (!all_told && std::all_of(peers_.begin(), peers_.end(), [](const Peer& peer) { return peer.socket < 0 || peer.told; })) {
            all_told = true;
            on_all();
            continue;
        }
        const uint64_t missing = unfinished();
        if (!missing) break;
        const auto now = Clock::now();
        if (moved) {
            if (idle) waited += now - idle_since;
            idle = false;
            continue;
        }
        if (!idle) idle = true, idle_since = now;
        if (uint64_t lost = lost_.load()) throw PeersLost(lost, Fault::GONE);
        if (now >= until) lose(missing, Fault::LATE);
        switch (patience_.turn(now - idle_since)) {
            case Patience::LOOK: pause(); break;
            case Patience::YIELD: std::this_thread::yield(); break;
            case Patience::SLEEP: sleep(until);
        }
    }
    if (idle) waited += Clock::now() - idle_since;
    if (waited > Clock::duration::zero()) patience_.learn(waited);
    traffic_.seconds_waited += std::chrono::duration<double>(waited).count();
}

// Sends and receives what the connections take and give; whether they did at all.
template <class OnHeader> bool SocketExchange::move(Doing doing, const OnHeader& on_header) {
    bool moved = false;
    for (int r = 0; r < sizes_.ranks; r++) {
        Peer& peer = peers_[r];
        if (peer.socket < 0) continue;
        if (peer.out.left()) moved |= send(r);
        if (peer.in.left()) moved |= receive(r);
        if (peer.told || peer.in.left()) continue;
        check_header(doing, r);
        peer.told = true;
        on_header(r);
        if (peer.in.left()) moved |= receive(r);  // it is mostly there already
    }
    return moved;
}

void SocketExchange::check_header(Doing doing, int rank) {
    const Header& found = peers_[rank].found;
    if (found.doing != doing || found.call != call_) lose(bit(rank), Fault::OUT_OF_STEP);
}

bool SocketExchange::send(int rank) {
    const Peer& peer = peers_[rank];
    Pieces& out = peers_[rank].out;
    if (peer.to) {
        const size_t taken = peer.to->put(out.next(), out.count());
        if (taken) out.advance(taken), wake(peer, peer.to->reader_sleeps);
        else if (peer.ended) lose(bit(rank), Fault::LEFT);
        return taken > 0;
    }
    msghdr message{};
    message.msg_iov = out.next();
    message.msg_iovlen = std::min(out.count(), MOST_PIECES);
    const ssize_t sent = sendmsg(peers_[rank].socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && not_now(errno)) return false;
    if (sent < 0) lose(bit(rank), Fault::LEFT);
    out.advance(size_t(sent));
    return true;
}

bool SocketExchange::receive(int rank) {
    const Peer& peer = peers_[rank];
    Pieces& in = peers_[rank].in;
    if (peer.from) {
        // Who has left may have sent before, so its end counts when there is nothing more.
        const size_t found = peer.from->take(in.next(), in.count());
        if (found) in.advance(found), wake(peer, peer.from->writer_sleeps);
        else if (peer.ended) lose(bit(rank), Fault::LEFT);
        return found > 0;
    }
    msghdr message{};
    message.msg_iov = in.next();
    message.msg_iovlen = std::min(in.count(), MOST_PIECES);
    const ssize_t received = recvmsg(peers_[rank].socket, &message, MSG_DONTWAIT);
    if (received < 0 && not_now(errno)) return false;
    if (received <= 0) lose(bit(rank), Fault::LEFT);
    in.advance(size_t(received));
    return true;
}

uint64_t SocketExchange::unfinished() const {
    uint64_t found = 0;
    for (int r = 0; r < sizes_.ranks; r++)
        if (peers_[r].out.left() || peers_[r].in.left()) found |= bit(r);
    return found;
}

void SocketExchange::sleep(Clock::time_point until) {
    std::vector<pollfd> waiting;
    for (Peer& peer : peers_) {
        short events = (peer.out.left() ? POLLOUT : 0) | (peer.in.left() ? POLLIN : 0);
        if (!events) continue;
        if (peer.to) {
            events = POLLIN;
            if (peer.out.left()) peer.to->writer_sleeps.store(1);
            if (peer.in.left()) peer.from->reader_sleeps.store(1);
        }
        waiting.push_back({peer.socket, events, 0});
    }
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - Clock::now()).count();
    if (!may_go_on()) poll(waiting.data(), nfds_t(waiting.size()), int(std::clamp<int64_t>(left + 1, 0, 3'600'000)));
    for (Peer& peer : peers_)
        if (peer.to && (peer.out.left() || peer.in.left())) hear(peer);
}

// Whether a ring has become ready before the others could know that this rank sleeps. In the one order of these operations the
// flag comes before our look at the ring, or their bytes before their look at the flag.
bool SocketExchange::may_go_on() const {
    return std::any_of(peers_.begin(), peers_.end(), [](const Peer& peer) {
        return peer.to && ((peer.out.left() && peer.to->has_room()) || (peer.in.left() && peer.from->has_bytes()));
    });
}

void SocketExchange::wake(const Peer& peer, std::atomic<uint32_t>& sleeps) {
    if (!sleeps.load() || !sleeps.exchange(0)) return;
    const char call = 0;
    ::send(peer.socket, &call, 1, MSG_DONTWAIT | MSG_NOSIGNAL);  // where it has ended, that is found soon
}

// What has come through the connection of a rank whose bytes go through rings.
void SocketExchange::hear(Peer& peer) {
    peer.to->writer_sleeps.store(0);
    peer.from->reader_sleeps.store(0);
    char calls[64];
    while (true) {
        const ssize_t found = recv(peer.socket, calls, sizeof(calls), MSG_DONTWAIT);
        if (found > 0) continue;
        peer.ended = found == 0 || !not_now(errno);
        return;
    }
}

// --- the operations ---

std::vector<std::vector<int64_t>> SocketExchange::agree(const std::vector<int64_t>& values) {
    if (values.size() > MOST_AGREED) throw std::invalid_argument("more values than ranks can agree on");
    begin(AGREE);
    call_++;
    for (int r = 0; r < sizes_.ranks; r++) {
        if (r == rank_) continue;
        open(AGREE, r, values.size());
        peers_[r].out.add(values.data(), values.size() * sizeof(int64_t));
    }
    trade(AGREE, [&](int r) {
        Peer& peer = peers_[r];
        if (peer.found.count > MOST_AGREED) lose(bit(r), Fault::OUT_OF_STEP);
        peer.values.resize(peer.found.count);
        peer.in.add(peer.values.data(), peer.found.count * sizeof(int64_t));
    }, [] {});
    std::vector<std::vector<int64_t>> all;
    for (int r = 0; r < sizes_.ranks; r++) all.push_back(r == rank_ ? values : peers_[r].values);
    return all;
}

int SocketExchange::dispatch(const Tokens& tokens, void* rows, int64_t* ids) {
    begin(DISPATCH);
    if (tokens.count > sizes_.tokens) throw std::invalid_argument("more tokens than the group was made for");
    split(tokens);
    call_++;
    const size_t row_bytes = sizes_.row_bytes;
    char* received = static_cast<char*>(rows);
    for (int r = 0; r < sizes_.ranks; r++) {
        Peer& peer = peers_[r];
        if (r == rank_) continue;
        open(DISPATCH, r, peer.rows.size());
        peer.out.add(peer.ids_out.data(), peer.ids_out.size() * sizeof(int32_t));
        for (int t : peer.rows) peer.out.add(static_cast<const char*>(tokens.x) + t * row_bytes, row_bytes);
        traffic_.bytes_out += peer.rows.size() * row_bytes;
    }
    trade(DISPATCH, [&](int r) {
        Peer& peer = peers_[r];
        if (peer.found.count > uint64_t(sizes_.tokens)) lose(bit(r), Fault::OUT_OF_STEP);
        peer.count = peer.found.count;
        peer.ids_in.resize(peer.count * sizes_.top_k);
        peer.in.add(peer.ids_in.data(), peer.ids_in.size() * sizeof(int32_t));
        traffic_.bytes_in += peer.count * row_bytes;
    }, [&] {
        // Rows lie in the order of ranks: where each rank's begin is known only now.
        size_t place = 0;
        for (Peer& peer : peers_) {
            peer.place = place;
            place += peer.count;
            if (peer.socket >= 0) peer.in.add(received + peer.place * row_bytes, peer.count * row_bytes);
        }
    });
    take(tokens, received, ids);
    combine_next_ = true;
    return int(peers_.back().place + peers_.back().count);
}

// For each rank, the rows that it holds an expert of, and the experts.
void SocketExchange::split(const Tokens& tokens) {
    const int top_k = sizes_.top_k;
    for (Peer& peer : peers_) peer.rows.clear(), peer.ids_out.clear(), peer.pairs_there = 0;
    for (int t = 0; t < tokens.count; t++) {
        const size_t first = size_t(t) * top_k;
        const uint64_t needed = find_owners(tokens, t, top_k, sizes_.ranks, &owners_[first]);
        for (int r = 0; r < sizes_.ranks; r++) {
            if (!(needed & bit(r))) continue;
            Peer& peer = peers_[r];
            peer.rows.push_back(t);
            for (int k = 0; k < top_k; k++) {
                const bool there = owners_[first + k] == r;
                peer.ids_out.push_back(there ? int32_t(tokens.ids[first + k]) : tokens.experts);
                peer.pairs_there += there;
            }
        }
    }
    tokens_ = tokens.count;
    peers_[rank_].count = peers_[rank_].rows.size();
}

// This rank's own rows, and what experts all received rows want here.
void SocketExchange::take(const Tokens& tokens, char* rows, int64_t* ids) {
    here_.clear();
    for (int r = 0; r < sizes_.ranks; r++) {
        const Peer& peer = peers_[r];
        for (size_t i = 0; r == rank_ && i < peer.count; i++)
            std::memcpy(rows + (peer.place + i) * sizes_.row_bytes, static_cast<const char*>(tokens.x) + peer.rows[i] * sizes_.row_bytes,
                        sizes_.row_bytes);
        for (int32_t id : r == rank_ ? peer.ids_out : peer.ids_in) {
            if (id < 0 || id > tokens.experts) lose(bit(r), Fault::OUT_OF_STEP);
            ids[here_.size()] = id;
            here_.push_back(id != tokens.experts);
        }
    }
}

void SocketExchange::combine(const void* outputs, void* back) {
    begin(COMBINE);
    call_++;
    const size_t row_bytes = sizes_.row_bytes, top_k = size_t(sizes_.top_k);
    const char* made = static_cast<const char*>(outputs);
    char* home = static_cast<char*>(back);
    for (int r = 0; r < sizes_.ranks; r++) {
        if (r == rank_) continue;
        Peer& peer = peers_[r];
        const size_t first = peer.place * top_k, count = peer.count * top_k;
        const size_t pairs = size_t(std::count(here_.begin() + first, here_.begin() + first + count, 1));
        open(COMBINE, r, pairs);
        for_each_run(here_.data() + first, count, [&](uint8_t here, size_t from, size_t run) {
            if (here) peer.out.add(made + (first + from) * row_bytes, run * row_bytes);
        });
        traffic_.bytes_out += pairs * row_bytes;
        traffic_.bytes_in += peer.pairs_there * row_bytes;
    }
    trade(COMBINE, [&](int r) {
        // Both sides know which pairs there are: home's rows in order, a row's choices in order.
        Peer& peer = peers_[r];
        if (peer.found.count != peer.pairs_there) lose(bit(r), Fault::OUT_OF_STEP);
        for_each_run(owners_.data(), size_t(tokens_) * top_k, [&](uint8_t owner, size_t from, size_t run) {
            if (owner == r) peer.in.add(home + from * row_bytes, run * row_bytes);
        });
    }, [] {});
    const Peer& own = peers_[rank_];
    for (size_t i = 0; i < own.count; i++)
        for_each_run(here_.data() + (own.place + i) * top_k, top_k, [&](uint8_t here, size_t from, size_t run) {
            if (here)
                std::memcpy(home + (own.rows[i] * top_k + from) * row_bytes, made + ((own.place + i) * top_k + from) * row_bytes, run * row_bytes);
        });
    combine_next_ = false;
}

}  // namespace moebius
