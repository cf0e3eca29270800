// Threads that wait for work: they spin for a moment, so that the operations of a step find them awake, then sleep, so
// that an idle engine uses no processor time.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace moebius {

class Pool {
public:
    // `threads` in all, the caller's among them.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return int(workers_.size()) + 1; }

    // Calls body(item, thread) for every item of [0, count), each once, and returns when all are done. A thread has a run of
    // items of its own, so that it reads one stretch of memory; when it is through it takes what others have not begun.
    // One caller at a time: a second one waits for the first. What a body throws, the first of it, the caller gets.
    template <class Body> void run(int count, const Body& body) {
        run(count, [](const void* b, int item, int thread) { (*static_cast<const Body*>(b))(item, thread); }, &body);
    }

private:
    using Call = void (*)(const void*, int, int);
    void run(int count, Call call, const void* body);
    void work(int thread);
    void take_items(int thread);
    // Where a thread's run begins.
    int first_of(int share) const { return int(int64_t(count_) * share / threads()); }
    bool wait_for_job(uint64_t seen);

    std::vector<std::thread> workers_;
    std::mutex one_caller_;
    // The job. Written while `open_` is false and nobody is inside.
    Call call_ = nullptr;
    const void* body_ = nullptr;
    int count_ = 0;
    struct alignas(64) Cursor {
        std::atomic<int> next;  // item of a thread's run
    };
    std::vector<Cursor> cursors_;
    alignas(64) std::atomic<int> inside_{0};
    std::atomic<bool> open_{false};
    std::atomic<uint64_t> jobs_{0};
    std::atomic<int> sleeping_{0};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<bool> stopping_{false};
    std::exception_ptr error_;  // under mutex_
};

}  // namespace moebius
