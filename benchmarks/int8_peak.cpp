// How fast argv[1] threads multiply bytes, by the instructions of argv[2]: avx2, avx512, avx512vnni or amx. Registers alone, no
// memory. For each line of standard input one pass: {"gmacs": ...}, 1e9 multiplications and additions in a second of the
// threads' own time.
// g++ -O3 -pthread
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

double seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

// As many independent sums as hide how long one takes.
#define SIX(one) one(0, 6) one(1, 7) one(2, 8) one(3, 9) one(4, 10) one(5, 11)
#define LOW "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm13"
#define PAIRS(register, product, sum)                                                                         \
    "vpmaddubsw %%" register "14, %%" register "15, %%" register #product "\n"                                \
    "vpmaddwd %%" register "13, %%" register #product ", %%" register #product "\n"                           \
    "vpaddd %%" register #product ", %%" register #sum ", %%" register #sum "\n"
#define PAIRS_8(product, sum) PAIRS("ymm", product, sum)
#define PAIRS_16(product, sum) PAIRS("zmm", product, sum)
#define QUADS(first, second) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #first "\nvpdpbusd %%zmm14, %%zmm15, %%zmm" #second "\n"

double avx2() {
    asm volatile(SIX(PAIRS_8)::: LOW);
    return 6 * 32;
}
double avx512() {
    asm volatile(SIX(PAIRS_16)::: LOW);
    return 6 * 64;
}
double vnni() {
    asm volatile(SIX(QUADS)::: LOW);
    return 12 * 64;
}
double amx() {
    asm volatile(
        "tdpbssd %tmm6, %tmm4, %tmm0\ntdpbssd %tmm6, %tmm5, %tmm1\ntdpbssd %tmm7, %tmm4, %tmm2\ntdpbssd %tmm7, %tmm5, %tmm3\n");
    return 4 * 16 * 16 * 64;
}

void configure_amx() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;
    if (syscall(SYS_arch_prctl, REQUEST, TILE_DATA) != 0) std::exit(1);
}
void configure_tiles() {
    alignas(64) uint8_t shapes[64] = {1};
    for (int t = 0; t < 8; t++) shapes[16 + 2 * t] = 64, shapes[48 + t] = 16;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
}

template <class Step> double rate(Step step) {
    double done = 0;
    const double start = seconds();
    double now = start;
    while (now < start + 0.05) {
        for (int i = 0; i < 10000; i++) done += step();
        now = seconds();
    }
    return done / (now - start) / 1e9;
}

double pass(const char* isa) {
    if (!std::strcmp(isa, "avx2")) return rate(avx2);
    if (!std::strcmp(isa, "avx512")) return rate(avx512);
    if (!std::strcmp(isa, "avx512vnni")) return rate(vnni);
    if (!std::strcmp(isa, "amx")) return configure_tiles(), rate(amx);
    std::fprintf(stderr, "no loop for %s\n", isa);
    std::exit(2);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::fprintf(stderr, "usage: int8_peak THREADS avx2|avx512|avx512vnni|amx\n");
        return 2;
    }
    if (!std::strcmp(argv[2], "amx")) configure_amx();
    for (int c; (c = std::getchar()) != EOF;) {
        if (c != '\n') continue;
        std::vector<double> rates(std::atoi(argv[1]));
        std::vector<std::thread> workers;
        for (double& found : rates) workers.emplace_back([&found, argv] { found = pass(argv[2]); });
        for (auto& worker : workers) worker.join();
        double sum = 0;
        for (double found : rates) sum += found;
        std::printf("{\"gmacs\": %.2f}\n", sum);
        std::fflush(stdout);
    }
}
