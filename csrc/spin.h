// What a thread does between two looks at a word that another is about to write.
#pragma once
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moebius {

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("isb");  // waits for some tens of cycles, as x86's pause does; `yield` is over at once
#else
    std::this_thread::yield();
#endif
}

}  // namespace moebius
