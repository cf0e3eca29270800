// What one request asks of its row of logits before temperature, and how a row becomes what it was.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace moebius {

// In this order, in float64, rounded to float32 once; ops/sampling.py has the words.
struct Shaping {
    std::vector<int32_t> biased;  // ids, each once
    std::vector<double> bias;     // added to their logits
    std::vector<int32_t> seen, drawn;  // ids of prompt and output, as often as they occur
    double repetition, presence, frequency;
    std::vector<int32_t> banned;  // ids

    size_t num_ids() const { return biased.size() + seen.size() + drawn.size() + banned.size(); }
};

// What stands for an id where none is drawn; ops/sampling.py has the words.
constexpr int64_t NOT_FINITE = -1, ALL_BANNED = -2;

// The logits that shapings changed, as they were before.
class Shaped {
public:
    struct Row {
        float* logits;
        std::vector<int32_t> ids;
        std::vector<float> values;
    };
    explicit Shaped(size_t rows) : rows(rows) {}
    // Puts them back; a second call does nothing.
    void restore();

    std::vector<Row> rows;
};

}  // namespace moebius
