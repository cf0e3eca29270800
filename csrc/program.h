// Operations as they were called once, to be called again on as many rows as come: all else that they were given, addresses
// above all, stays as it was.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

namespace moebius {

struct Program {
    // Where calls read integers that each run brings, a row each, and which of the run's counts says how many.
    struct Column {
        int64_t* to;
        int count;
    };
    // A call on `factor` times so many rows as one of the run's counts says.
    struct Call {
        std::function<void(int rows)> call;
        int count, factor;
    };
    std::vector<Column> columns;
    std::vector<Call> calls;

    void load(const std::vector<uintptr_t>& from, const std::vector<int>& counts) const {
        for (size_t i = 0; i < from.size(); i++)
            std::copy_n(reinterpret_cast<const int64_t*>(from[i]), counts.at(columns.at(i).count), columns[i].to);
    }
    // Calls `first` to `stop` - 1.
    void run(size_t first, size_t stop, const std::vector<int>& counts) const {
        for (size_t i = first; i < stop; i++) calls.at(i).call(counts.at(calls[i].count) * calls[i].factor);
    }
};

}  // namespace moebius
