#include "pool.h"

#include <chrono>
#include <utility>

#include "spin.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moebius {
namespace {

constexpr auto SPIN = std::chrono::microseconds(200);

// Subnormal numbers take a hundred times as long and mean nothing here; flushed on every thread alike, and so for one
// answer. What the caller had is put back.
class FlushSubnormals {
public:
#if defined(__x86_64__)
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr((before_ | 0x8040) & ~0x6000u); }
    ~FlushSubnormals() { _mm_setcsr(before_); }

private:
    unsigned before_;
#elif defined(__aarch64__)
    // Nothing but bit 24 (FZ): subnormal inputs and results are zeros, rounding is to nearest, nothing traps.
    FlushSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before_));
        asm volatile("msr fpcr, %0" ::"r"(uint64_t(1) << 24) : "memory");
    }
    ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(before_) : "memory"); }

private:
    uint64_t before_;
#else
    FlushSubnormals() {}  // this processor's way is not known here: subnormal numbers are computed with
#endif
};

}  // namespace

Pool::Pool(int threads) : cursors_(threads) {
    for (int i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
}

Pool::~Pool() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stopping_ = true;  // under the lock: a worker that has just looked would sleep through the call below
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::take_items(int thread) {
    for (int i = 0; i < threads(); i++) {
        const int share = (thread + i) % threads(), end = first_of(share + 1);
        for (int item; (item = cursors_[share].next.fetch_add(1)) < end;) try {
                call_(body_, item, thread);
            } catch (...) {
                std::lock_guard<std::mutex> lock(mutex_);
                if (!error_) error_ = std::current_exception();
            }
    }
}

void Pool::run(int count, Call call, const void* body) {
    if (count <= 0) return;
    FlushSubnormals flush;
    std::lock_guard<std::mutex> only(one_caller_);
    if (count == 1 || workers_.empty()) {
        for (int i = 0; i < count; i++) call(body, i, 0);
        return;
    }
    call_ = call, body_ = body, count_ = count;
    for (int i = 0; i < threads(); i++) cursors_[i].next.store(first_of(i));
    open_.store(true);
    jobs_.fetch_add(1);
    if (sleeping_.load()) {
        std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    take_items(0);
    // A worker enters first and looks whether the job is open then; so after this nobody can begin it, and a worker that
    // is not awake yet is not waited for.
    open_.store(false);
    while (inside_.load()) pause();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

bool Pool::wait_for_job(uint64_t seen) {
    auto until = std::chrono::steady_clock::now() + SPIN;
    for (int i = 1;; i++) {
        if (stopping_ || jobs_.load() != seen) return !stopping_;
        pause();
        if (i % 64 == 0 && std::chrono::steady_clock::now() > until) break;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return stopping_ || jobs_.load() != seen; });
    sleeping_.fetch_sub(1);
    return !stopping_;
}

void Pool::work(int thread) {
    FlushSubnormals flush;
    uint64_t seen = 0;
    while (wait_for_job(seen)) {
        seen = jobs_.load();
        inside_.fetch_add(1);
        if (open_.load()) take_items(thread);
        inside_.fetch_sub(1);
    }
}

}  // namespace moebius
