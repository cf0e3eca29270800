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
    // Where it is not null: id i may be drawn if bit i % 32 of word i / 32 is set.
    const uint32_t* allowed = nullptr;
    size_t words = 0;

    size_t num_ids() const { return biased.size() + seen.size() + drawn.size() + banned.size(); }
};

// The logits that shapings changed, as they were before; whole rows lie in memory that the caller keeps until then.
class Shaped {
public:
    struct Row {
        float* logits;
        std::vector<int32_t> ids;
        std::vector<float> values;
        // All of the row, or null, between the changes of `ids` and those of what is not allowed.
        const float* whole;
        size_t size;
    };
    explicit Shaped(size_t rows) : rows(rows) {}
    // Puts them back; a second call does nothing.
    void restore();

    std::vector<Row> rows;
};

}  // namespace moebius
