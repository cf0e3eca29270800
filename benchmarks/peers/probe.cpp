// How fast argv[1] threads read memory with a plain loop: anonymous huge pages, and a mapped file (argv[2]).
// For each line of standard input one pass over each: {"anonymous_gbs": ..., "mapped_gbs": ...}, in 1e9 bytes a second.
// g++ -O3 -march=native -pthread
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

std::atomic<uint64_t> sink{0};

void sum(const uint64_t* words, size_t count) {
    uint64_t total = 0;
    for (size_t i = 0; i < count; ++i) total += words[i];
    sink += total;
}

// Every thread reads a stretch of its own.
double read_speed(const char* memory, size_t bytes, int threads) {
    const size_t share = bytes / threads / 4096 * 4096;
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t)
        workers.emplace_back(sum, reinterpret_cast<const uint64_t*>(memory + t * share), share / 8);
    for (auto& worker : workers) worker.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    return static_cast<double>(share) * threads / seconds.count() / 1e9;
}

[[noreturn]] void fail(const char* what) {
    std::perror(what);
    std::exit(1);
}

const char* huge_pages() {
    void* memory = mmap(nullptr, kBytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    const auto address = (reinterpret_cast<uintptr_t>(memory) + kHugePage - 1) / kHugePage * kHugePage;
    char* aligned = reinterpret_cast<char*>(address);
    madvise(aligned, kBytes, MADV_HUGEPAGE);
    std::memset(aligned, 1, kBytes);
    return aligned;
}

const char* mapped(const char* path, size_t* bytes) {
    const int file = open(path, O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0) fail(path);
    *bytes = static_cast<size_t>(status.st_size) < kBytes ? status.st_size : kBytes;
    void* memory = mmap(nullptr, *bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0);
    if (memory == MAP_FAILED) fail("mmap");
    return static_cast<const char*>(memory);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: probe THREADS FILE\n");
        return 2;
    }
    const int threads = std::atoi(argv[1]);
    size_t bytes;
    const char* file = mapped(argv[2], &bytes);
    const char* anonymous = huge_pages();
    for (int c; (c = std::getchar()) != EOF;) {
        if (c != '\n') continue;
        const double first = read_speed(anonymous, kBytes, threads), second = read_speed(file, bytes, threads);
        std::printf("{\"anonymous_gbs\": %.2f, \"mapped_gbs\": %.2f}\n", first, second);
        std::fflush(stdout);
    }
}
