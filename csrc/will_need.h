// Files that are mapped, and whose pages may not be in memory yet.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace moebius {

// Asks the system to read these bytes from their file, without waiting for them. In pieces, as Linux reads no more ahead
// at one call than a disk takes at once.
inline void will_need(const void* data, size_t bytes) {
#if defined(MADV_WILLNEED)
    constexpr uintptr_t PIECE = 256 << 10;
    static const uintptr_t page = sysconf(_SC_PAGESIZE);
    const uintptr_t stop = reinterpret_cast<uintptr_t>(data) + bytes;
    for (uintptr_t at = reinterpret_cast<uintptr_t>(data) / page * page; at < stop; at += PIECE)
        madvise(reinterpret_cast<void*>(at), std::min(PIECE, stop - at), MADV_WILLNEED);
#endif
}

}  // namespace moebius
