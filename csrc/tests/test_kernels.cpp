// The operations against plain loops in float64, at every instruction set that this processor has.
//
//   cmake -S . -B build/tests -DMOEBIUS_TESTS=ON && cmake --build build/tests && build/tests/test_kernels
//
// builds with AddressSanitizer and UndefinedBehaviorSanitizer. Every array is exactly as large as it has to be, so that
// reading one element too many is found.
#include <stdexcept>

#include "block_cases.h"
#include "naive.h"
#include "naive_attention.h"
#include "naive_codes.h"
#include "product_cases.h"
#include "recurrent_cases.h"
#include "sampling_cases.h"

namespace {

// --- row by row ---

template <class T, class W> void test_norms(Ops& ops) {
    const double u = Number<T>::roundoff;
    for (int turn = 0; turn < 20; turn++) {
        const int rows = one_of({0, 1, 3, 40}), n = one_of({1, 7, 16, 33, 500});
        const float multiplier = turn % 2 ? 1.0f : 0.3f;
        const bool less_mean = turn % 4 > 1;
        std::vector<T> x = draw<T>(size_t(rows) * n), update = draw<T>(x.size()), sum(x.size()), out(x.size()), alone(x.size());
        std::vector<W> weight = draw<W>(n);
        ops.rms_norm({Number<T>::dtype, x.data(), update.data(), multiplier, {weight.data(), Number<W>::dtype}, n, n, 1e-5f, sum.data(), out.data(), less_mean}, rows);
        ops.rms_norm({Number<T>::dtype, sum.data(), nullptr, 1, {weight.data(), Number<W>::dtype}, n, n, 1e-5f, nullptr, alone.data(), less_mean}, rows);
        check(out == alone, "rms_norm: the sum's norm is not the norm of the sum");
        for (size_t i = 0; i < x.size(); i++) {
            Sum s;
            s.add(value(x[i])), s.add(double(multiplier) * value(update[i]));
            close("residual", sum[i], s.exact, (u + 0x1p-23) * s.terms);
            double mean = 0, squares = 0, size = 0;
            if (less_mean) for (int j = 0; j < n; j++) mean += value(sum[i / n * n + j]) / n, size = std::max(size, std::abs(value(sum[i / n * n + j])));
            for (int j = 0; j < n; j++) squares += std::pow(value(sum[i / n * n + j]) - mean, 2) / n;
            const double weighed = value(weight[i % n]) / std::sqrt(squares + 1e-5f), exact = (value(sum[i]) - mean) * weighed;
            const double rounded = (n / 32.0 + 8) * 0x1p-24;
            close("rms_norm", out[i], exact, (2.1 * u + rounded) * std::abs(exact) + 2 * rounded * size * std::abs(weighed));
        }
    }
}

template <class T> void test_add_gated(Ops& ops) {
    for (int turn = 0; turn < 10; turn++) {
        const int rows = one_of({0, 1, 18}), n = one_of({1, 15, 16, 50});
        std::vector<T> a = draw<T>(size_t(rows) * n), b = draw<T>(a.size()), out(a.size());
        std::vector<float> gate = draw<float>(rows, 3);
        ops.add_gated(Number<T>::dtype, a.data(), b.data(), turn % 2 ? gate.data() : nullptr, rows, n, out.data());
        for (size_t i = 0; i < a.size(); i++) {
            Sum s;
            s.add(value(a[i])), s.add(value(b[i]) * (turn % 2 ? 1 / (1 + std::exp(-double(gate[i / n]))) : 1));
            close("add_gated", out[i], s.exact, Number<T>::roundoff * std::abs(s.exact) + 0x1p-20 * s.terms);
        }
    }
}

void test_rotation(Ops& ops) {
    for (int rows : {0, 1, 33}) {
        const int half = 5;
        std::vector<int64_t> positions(rows);
        for (int64_t& p : positions) p = uniform(0, 1'000'000);
        std::vector<float> inverse = draw<float>(half), cos(size_t(rows) * half), sin(cos.size());
        ops.rotation(positions.data(), rows, inverse.data(), half, 1.5f, cos.data(), sin.data());
        for (size_t i = 0; i < cos.size(); i++) {
            const double angle = float(positions[i / half]) * inverse[i % half];
            close("cos", cos[i], 1.5 * std::cos(angle), 0x1p-22), close("sin", sin[i], 1.5 * std::sin(angle), 0x1p-22);
        }
    }
}

// Rows on every thread: subnormal numbers count as zeros there, and as before on the caller's once the call is over.
void test_subnormals(Ops& ops) {
    const float tiny = 1e-40f;
    const int rows = 64, n = 48;
    std::vector<float> a(size_t(rows) * n, tiny), b(a.size(), tiny), out(a.size(), 1.0f);
    ops.add_gated(F32, a.data(), b.data(), nullptr, rows, n, out.data());
    for (float x : out) check(x == 0, "%g is not flushed", double(x));
    ops.add_gated(F32, a.data(), b.data(), nullptr, 1, n, out.data());
    check(out[0] == 0, "%g of one row is not flushed", double(out[0]));
    volatile float half = tiny;
    half = half / 2;
    check(half > 0, "the caller's subnormal numbers are gone");
}

// --- threads ---

// Many short jobs: each item once, on a thread that does one thing at a time.
void use(Pool& pool, int jobs, std::mt19937 own) {
    for (int job = 0; job < jobs; job++) {
        std::vector<int> done(own() % 40, 0);
        pool.run(int(done.size()), [&](int item, int thread) {
            check(thread >= 0 && thread < pool.threads(), "pool: thread %d of %d", thread, pool.threads());
            done[item]++;
        });
        check(std::all_of(done.begin(), done.end(), [](int n) { return n == 1; }), "pool: an item was not done once");
        if (job % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(own() % 600));
    }
}

void test_pool() {
    for (int threads : {1, 2, 3, 5}) {
        Pool pool(threads);
        check(pool.threads() == threads, "pool: %d threads", pool.threads());
        use(pool, 2000, std::mt19937(threads));
        // Two callers share the pool's threads by turns, so that a thread's number is a key to what it alone may touch.
        std::vector<std::atomic<int>> busy(threads);
        auto caller = [&](int seed) {
            std::mt19937 own(seed);
            for (int job = 0; job < 500; job++)
                pool.run(int(own() % 4), [&](int, int thread) {
                    check(busy[thread].fetch_add(1) == 0, "pool: thread %d does two things at once", thread);
                    busy[thread].fetch_sub(1);
                });
        };
        std::thread other(caller, 1);
        caller(2), other.join();
    }
    for (int turn = 0; turn < 300; turn++) {  // ended while its threads spin, fall asleep or sleep
        Pool pool(3);
        use(pool, turn % 3, std::mt19937(turn));
        std::this_thread::sleep_for(std::chrono::microseconds(turn % 5 * 70));
    }
}

void test_levels() {
    for (const char* name : {"sse9", "AVX2", " "}) {
        bool refused = false;
        try {
            select_kernels(name);
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        check(refused, "an instruction set named %s", name);
    }
    check(select_kernels("") == select_kernels(available_kernels().back()), "the best is not the default");
}

template <class T> void test_dtype(Ops& ops) {
    test_weights<T, T>(ops), test_norms<T, T>(ops), test_norms<T, float>(ops), test_add_gated<T>(ops);
    test_rotated_heads<T, T>(ops, 9, 21, false, false), test_rotated_heads<T, float>(ops, 9, 21, false, true);
    test_rotated_heads<T, T>(ops, 9, 21, false, false, true), test_rotated_heads<T, float>(ops, 5, 16, true, true, true);
    for (int half : {3, 8, 9, 16, 29}) test_rotated_heads<T, T>(ops, half, 2 * half + half % 3, true, half % 2);
    test_attention<T>(ops), test_codes<T>(ops);
    test_selective_scans<T>(ops), test_grouped_norms<T, T>(ops), test_grouped_norms<T, float>(ops);
    test_convolutions<T>(ops), test_gated_delta<T>(ops), test_gated_norms<T, T>(ops), test_gated_norms<T, float>(ops), test_gates<T>(ops);
}

}  // namespace

int main() {
    test_levels(), test_pool();
    for (const std::string& name : available_kernels()) {
        level = name.c_str();
        generator.seed(0);  // the same numbers for each, whatever the levels before it drew
        check(std::string(select_kernels(name)->name) == name, "the kernels are called %s", select_kernels(name)->name);
        Ops ops(name, 2), portable("portable", 1);
        test_subnormals(ops), test_rotation(ops), test_route(ops), test_sampling(ops), test_shaping(ops);
        test_dtype<float>(ops), test_dtype<uint16_t>(ops);
        test_weights<float, f16>(ops), test_weights<float, uint16_t>(ops), test_float16(ops), test_formats(*select_kernels(name));
        test_blocks<float>(ops, portable), test_blocks<uint16_t>(ops, portable);
        std::printf("%s: passed\n", level);
    }
}
