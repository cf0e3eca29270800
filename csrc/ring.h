// A stream of bytes from one process to another through memory that both have mapped: what a connection does, without the
// kernel. One thread writes, one reads. Nobody waits here: who could not go on says so in a flag, and who makes that possible
// takes the flag and wakes it, however the two of them do that.
#pragma once
#include <sys/uio.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace moebius {

// Zeros are its first state. What the other process writes here is believed for no more than where bytes are in `data`.
class Ring {
public:
    static constexpr size_t SIZE = 256 * 1024;

    // Bytes of the pieces that it has taken, from the front.
    size_t put(const iovec* pieces, size_t count) {
        const uint64_t at = written_.load(std::memory_order_relaxed);
        const size_t moved = move(pieces, count, at, SIZE - std::min<uint64_t>(at - read_.load(), SIZE),
                                  [](char* here, char* piece, size_t bytes) { std::memcpy(here, piece, bytes); });
        if (moved) written_.store(at + moved);
        return moved;
    }

    // Bytes of the pieces that it has filled, from the front.
    size_t take(const iovec* pieces, size_t count) {
        const uint64_t at = read_.load(std::memory_order_relaxed);
        const size_t moved = move(pieces, count, at, std::min<uint64_t>(written_.load() - at, SIZE),
                                  [](char* here, char* piece, size_t bytes) { std::memcpy(piece, here, bytes); });
        if (moved) read_.store(at + moved);
        return moved;
    }

    bool has_bytes() const { return written_.load() != read_.load(); }
    bool has_room() const { return written_.load() - read_.load() < SIZE; }

    // Set by the side that is about to sleep, which then looks again; taken by the other, after it has moved bytes.
    std::atomic<uint32_t> reader_sleeps{0}, writer_sleeps{0};

private:
    template <class Copy> size_t move(const iovec* pieces, size_t count, uint64_t at, size_t most, const Copy& copy) {
        size_t moved = 0;
        for (size_t i = 0; i < count && moved < most; i++)
            for (size_t done = 0; done < pieces[i].iov_len && moved < most;) {
                const size_t place = (at + moved) % SIZE;
                const size_t bytes = std::min({pieces[i].iov_len - done, most - moved, SIZE - place});
                copy(data_ + place, static_cast<char*>(pieces[i].iov_base) + done, bytes);
                done += bytes;
                moved += bytes;
            }
        return moved;
    }

    alignas(64) std::atomic<uint64_t> written_{0};
    alignas(64) std::atomic<uint64_t> read_{0};
    alignas(64) char data_[SIZE];
};

}  // namespace moebius
