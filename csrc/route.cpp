// How tokens choose experts: the same function as ops/reference/routing.py, over the same settings.
#include <algorithm>
#include <cmath>

#include "ops.h"

namespace moebius {
namespace {

// Indices of the k largest of n values, largest first, ties to the lowest index.
void top_k(const float* values, int n, int k, int64_t* out) {
    for (int i = 0, found = 0; i < n; i++) {
        if (found == k && !(values[i] > values[out[k - 1]])) continue;
        int place = found < k ? found++ : k - 1;
        for (; place > 0 && values[i] > values[out[place - 1]]; place--) out[place] = out[place - 1];
        out[place] = i;
    }
}

// Returns log(sum exp(x)).
float softmax(float* x, int n) {
    float largest = *std::max_element(x, x + n), sum = 0;
    for (int i = 0; i < n; i++) sum += x[i] = std::exp(x[i] - largest);
    for (int i = 0; i < n; i++) x[i] /= sum;
    return largest + std::log(sum);
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// -sum p ln p in nats of what a router believes, as moe/health.py's router_probabilities has it: p = softmax(logits), whose
// scores may be at hand (and their log_sum), or p = scores / sum(scores) of sigmoid scores. `spare` may be overwritten.
double entropy(const RouterSettings& r, const float* logits, const float* scores, float log_sum, std::vector<float>& spare) {
    const int n = r.num_experts;
    double mean = 0;
    if (r.score == 1) {
        double sum = 0;
        for (int e = 0; e < n; e++) sum += scores[e];
        for (int e = 0; e < n; e++) mean += scores[e] != 0 ? scores[e] * std::log(scores[e]) : 0.0f;
        return std::log(sum) - mean / sum;
    }
    if (r.score == 2) {
        spare.assign(logits, logits + n);
        log_sum = softmax(spare.data(), n);
        scores = spare.data();
    }
    for (int e = 0; e < n; e++) mean += scores[e] != 0 ? scores[e] * (logits[e] - log_sum) : 0.0f;
    return -mean;
}

// Node-limited routing (DeepSeek-V2 and V3, arXiv 2412.19437 section 2.1.2): fill all but the best groups.
void keep_best_groups(const RouterSettings& r, float* choice, std::vector<float>& scores, std::vector<int64_t>& kept) {
    const int size = r.num_experts / r.num_groups;
    scores.resize(r.num_groups), kept.resize(r.groups_kept);
    for (int g = 0; g < r.num_groups; g++) {
        int64_t best[2];
        const int count = std::min(r.group_top2 ? 2 : 1, size);
        top_k(choice + g * size, size, count, best);
        scores[g] = choice[g * size + best[0]] + (count == 2 ? choice[g * size + best[1]] : 0.0f);
    }
    top_k(scores.data(), r.num_groups, r.groups_kept, kept.data());
    for (int g = 0; g < r.num_groups; g++)
        if (std::find(kept.begin(), kept.end(), g) == kept.end()) std::fill_n(choice + g * size, size, r.group_fill);
}

}  // namespace

void Ops::route(const RouterSettings& r, const float* logits, int rows, const float* selection_bias, const float* expert_scale,
                float* weights, int64_t* ids, const RouterTally& tally) {
    const int experts = r.num_experts, k = r.top_k, chunk = 16;
    std::vector<double> entropies(tally.pairs ? rows : 0);
    pool_.run((rows + chunk - 1) / chunk, [&](int item, int) {
        std::vector<float> capped(experts), scores(experts), choice(experts), groups;
        std::vector<int64_t> kept;
        for (int t = item * chunk; t < std::min(rows, (item + 1) * chunk); t++) {
            const float* row = logits + size_t(t) * experts;
            float* w = weights + size_t(t) * k;
            int64_t* chosen = ids + size_t(t) * k;
            for (int e = 0; e < experts; e++) capped[e] = r.softcap != 0 ? r.softcap * std::tanh(row[e] / r.softcap) : row[e];
            scores = capped;
            float log_sum = 0;
            if (r.score == 0) log_sum = softmax(scores.data(), experts);
            if (r.score == 1) for (float& s : scores) s = sigmoid(s);
            if (tally.pairs) entropies[t] = entropy(r, capped.data(), scores.data(), log_sum, choice);
            choice = scores;
            if (selection_bias) for (int e = 0; e < experts; e++) choice[e] += selection_bias[e];
            if (r.num_groups > 1) keep_best_groups(r, choice.data(), groups, kept);
            top_k(choice.data(), experts, k, chosen);
            for (int i = 0; i < k; i++) w[i] = r.weight >= 2 ? capped[chosen[i]] : scores[chosen[i]];
            if (r.weight == 2) softmax(w, k);
            if (r.weight == 3) for (int i = 0; i < k; i++) w[i] = sigmoid(w[i]);
            float sum = 0;
            for (int i = 0; i < k; i++) sum += w[i];
            const float divisor = std::max(sum + r.renorm_eps, r.renorm_least);
            for (int i = 0; i < k; i++) w[i] = (r.weight == 1 ? w[i] / divisor : w[i]) * r.scale;
            if (expert_scale) for (int i = 0; i < k; i++) w[i] *= expert_scale[chosen[i]];
        }
    });
    if (!tally.pairs) return;
    for (int p = 0; p < rows * k; p++) tally.pairs[ids[p]]++;
    for (double nats : entropies) {
        if (!std::isfinite(nats)) continue;  // of a token whose numbers went wrong: one must not spoil the sum for good
        tally.sums[0] += nats;
        tally.sums[1]++;
    }
}

void Ops::within_capacity(const WithinCapacity& w) {
    std::vector<int> taken(w.experts);
    for (int b = 0; b < w.step->sequences(); b++) {
        std::fill(taken.begin(), taken.end(), 0);
        for (int p = w.step->query_start[b] * w.top_k; p < w.step->query_start[b + 1] * w.top_k; p++)
            w.out[p] = taken.at(w.ids[p])++ < w.capacity ? w.weights[p] : 0.0f;
    }
}

}  // namespace moebius
