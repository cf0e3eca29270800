// How fast 2 threads (or argv[1]) read memory with a plain loop: anonymous huge pages, and a mapped file (argv[2]).
// Prints {"anonymous_gbs": ..., "mapped_gbs": ...}, the best of a few passes each. g++ -O3 -march=native -pthread
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr size_t kBytes = size_t{1} << 29;
constexpr size_t kHugePage = size_t{1} << 21;
constexpr int kPasses = 12;

std::atomic<uint64_t> sink{0};

void sum(const uint64_t* words, size_t count) {
    uint64_t total = 0;
    for (size_t i = 0; i < count; ++i) total += words[i];
    sink += total;
}

// Gigabytes per second of the best pass; every thread reads a stretch of its own.
double read_speed(const char* memory, size_t bytes, int threads) {
    double best = 0;
    const size_t share = bytes / threads / 4096 * 4096;
    for (int pass = 0; pass < kPasses; ++pass) {
        const auto start = std::chrono::steady_clock::now();
        std::vector<std::thread> workers;
        for (int t = 0; t < threads; ++t)
            workers.emplace_back(sum, reinterpret_cast<const uint64_t*>(memory + t * share), share / 8);
        for (auto& worker : workers) worker.join();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        const double speed = static_cast<double>(share) * threads / seconds.count() / 1e9;
        if (speed > best) best = speed;
    }
    return best;
}

[[noreturn]] void fail(const char* what) {
    std::perror(what);
    std::exit(1);
}

double anonymous_speed(int threads) {
    void* memory = mmap(nullptr, kBytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    const auto address = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
    char* aligned = reinterpret_cast<char*>(address);
    madvise(aligned, kBytes, MADV_HUGEPAGE);
    std::memset(aligned, 1, kBytes);
    const double speed = read_speed(aligned, kBytes, threads);
    munmap(memory, kBytes + kHugePage);
    return speed;
}

double mapped_speed(const char* path, int threads) {
    const int file = open(path, O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) fail(path);
    const size_t bytes = static_cast<size_t>(status.st_size) < kBytes ? status.st_size : kBytes;
    void* memory = mmap(nullptr, bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    if (memory == MAP_FAILED) fail("mmap");
    return read_speed(static_cast<const char*>(memory), bytes, threads);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: probe THREADS FILE\n");
        return 2;
    }
    const int threads = std::atoi(argv[1]);
    std::printf("{\"anonymous_gbs\": %.2f, \"mapped_gbs\": %.2f}\n", anonymous_speed(threads), mapped_speed(argv[2], threads));
}
