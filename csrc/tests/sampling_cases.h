// Routing, sampling and penalties against plain loops in float64.
#pragma once
#include <limits>

#include "naive.h"

namespace {

std::vector<int> best(const std::vector<double>& scores, int k) {
    std::vector<int> order(scores.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return scores[a] > scores[b]; });
    order.resize(k);
    return order;
}

void softmax(std::vector<double>& x) {
    const double largest = *std::max_element(x.begin(), x.end());
    double total = 0;
    for (double& v : x) total += v = std::exp(v - largest);
    for (double& v : x) v /= total;
}

// One token's experts and weights, best first.
std::pair<std::vector<int>, std::vector<double>> routed(const RouterSettings& r, const float* logits, const float* bias) {
    std::vector<double> capped(logits, logits + r.num_experts);
    for (double& x : capped) x = r.softcap != 0 ? r.softcap * std::tanh(x / r.softcap) : x;
    std::vector<double> scores = capped, group_scores, weights;
    if (r.score == 0) softmax(scores);
    if (r.score == 1) for (double& x : scores) x = 1 / (1 + std::exp(-x));
    std::vector<double> choice = scores;
    for (int e = 0; bias && e < r.num_experts; e++) choice[e] += bias[e];
    const int size = r.num_experts / r.num_groups;
    for (int g = 0; g < r.num_groups; g++) {
        std::vector<double> own(choice.begin() + g * size, choice.begin() + (g + 1) * size);
        std::sort(own.rbegin(), own.rend());
        group_scores.push_back(own[0] + (r.group_top2 && size > 1 ? own[1] : 0));
    }
    std::vector<int> kept = best(group_scores, r.groups_kept);
    for (int e = 0; e < r.num_experts; e++)
        if (r.num_groups > 1 && std::find(kept.begin(), kept.end(), e / size) == kept.end()) choice[e] = r.group_fill;
    std::vector<int> ids = best(choice, r.top_k);
    for (int id : ids) weights.push_back(r.weight >= 2 ? capped[id] : scores[id]);
    if (r.weight == 2) softmax(weights);
    if (r.weight == 3) for (double& w : weights) w = 1 / (1 + std::exp(-w));
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    for (double& w : weights) w = (r.weight == 1 ? w / std::max<double>(total + r.renorm_eps, r.renorm_least) : w) * r.scale;
    return {ids, weights};
}

void test_route(Ops& ops) {
    for (int turn = 0; turn < 60; turn++) {
        RouterSettings r{one_of({8, 16, 40}), 1, turn % 3, turn % 4, one_of({1, 1, 2, 4}), 1, uniform(0, 1),
                         one_of({-INFINITY, 0.0f}), 1e-9f, one_of({1.0f, 2.5f}), one_of({0.0f, 3.0f}), one_of({0.0f, 0.5f})};
        if (r.score == 2 && r.weight == 1) r.weight = 2;  // a sum of logits is near zero at times: nobody divides by it
        r.groups_kept = uniform(1, r.num_groups);
        r.top_k = uniform(1, r.num_experts / r.num_groups * r.groups_kept);
        const int rows = one_of({0, 1, 35});
        std::vector<float> logits = draw<float>(size_t(rows) * r.num_experts, 2), bias = draw<float>(r.num_experts);
        std::vector<float> weights(size_t(rows) * r.top_k);
        std::vector<int64_t> ids(weights.size());
        const bool biased = turn % 5 == 0 && !(r.group_fill == 0 && r.num_groups > 1);
        std::vector<int64_t> pairs(r.num_experts), counted(r.num_experts);
        double sums[2] = {0, 0};
        const RouterTally tally{turn % 7 ? pairs.data() : nullptr, sums};
        ops.route(r, logits.data(), rows, biased ? bias.data() : nullptr, nullptr, weights.data(), ids.data(), tally);
        for (int64_t id : ids) counted[id] += tally.pairs != nullptr;
        check(pairs == counted, "route: the tally has other pairs than were chosen");
        check(sums[1] == (tally.pairs ? rows : 0), "route: the tally has %d tokens", int(sums[1]));
        const double most = sums[1] * std::log(double(r.num_experts));
        check(0 <= sums[0] && sums[0] <= most * (1 + 1e-6), "route: an entropy sum of %g nats", sums[0]);
        for (int t = 0; t < rows; t++) {
            auto [chosen, exact] = routed(r, &logits[size_t(t) * r.num_experts], biased ? bias.data() : nullptr);
            for (int k = 0; k < r.top_k; k++) {
                const size_t at = size_t(t) * r.top_k + k;
                check(ids[at] == chosen[k], "route: expert %d instead of %d", int(ids[at]), chosen[k]);
                close("route", weights[at], exact[k], 1e-5 * std::abs(exact[k]) + 1e-7);
            }
        }
    }
}

void test_sampling(Ops& ops) {
    for (int turn = 0; turn < 40; turn++) {
        const int rows = uniform(0, 4), vocab = one_of({1, 2, 15, 16, 17, 100, 4097}), k = std::min(vocab, one_of({0, 1, 2, 20, 4097}));
        std::vector<float> logits = draw<float>(size_t(rows) * vocab, 4), heat(rows, 1.0f);
        for (float& x : logits) x = turn % 2 ? std::round(x) : x;  // ties
        for (float& x : heat) x = float(uniform(2, 20)) / 10;
        std::vector<double> sums(rows), uniforms(rows);
        for (double& u : uniforms) u = uniform(0, 999) / 1000.0;
        std::vector<int64_t> ids(size_t(rows) * k);
        std::vector<float> values(ids.size());
        std::vector<int32_t> all(rows), counts(rows, k), tokens(rows);
        std::iota(all.begin(), all.end(), 0);
        for (int32_t& token : tokens) token = uniform(0, vocab - 1);
        const Logits x{logits.data(), rows, vocab};
        ops.log_softmax_top_k(x, all, counts, heat, sums.data(), values.data(), ids.data());
        const std::vector<int64_t> drawn = ops.draw(x, all, heat, uniforms), ranks = ops.ranks(x, all, tokens);
        for (int t = 0; t < rows; t++) {
            std::vector<double> row(&logits[size_t(t) * vocab], &logits[size_t(t) * vocab] + vocab);
            std::vector<int> order = best(row, k);
            check(std::equal(order.begin(), order.end(), ids.begin() + size_t(t) * k), "not the best %d of %d", k, vocab);
            for (int i = 0; i < k; i++) check(values[size_t(t) * k + i] == float(row[order[i]]), "value of candidate %d", i);
            order = best(row, vocab);
            check(order[ranks[t] - 1] == tokens[t], "rank %d of %d", int(ranks[t]), vocab);
            const double largest = *std::max_element(row.begin(), row.end());
            double total = 0, below = 0;
            for (double& x : row) total += x = std::exp((x - largest) / heat[t]);
            close("logsumexp", float(sums[t]), largest / heat[t] + std::log(total), 1e-4);
            for (int i = 0; i < drawn[t]; i++) below += row[i] / total;
            const double above = below + row[drawn[t]] / total;
            check(below <= uniforms[t] + 1e-5 && uniforms[t] <= above + 1e-5, "draw: %d of %d", int(drawn[t]), vocab);
        }
        if (rows == 0) continue;
        logits[uniform(0, vocab - 1)] = one_of({NAN, INFINITY, -INFINITY});
        ops.log_softmax_top_k(x, all, counts, heat, sums.data(), values.data(), ids.data());
        for (int t = 0; t < rows; t++) check(std::isnan(sums[t]) == (t == 0), "log_softmax_top_k: row %d is %g", t, sums[t]);
    }
}

// Penalties of random tokens on some rows, twice named ones among them; in the end nothing is left of them.
void test_shaping(Ops& ops) {
    for (int turn = 0; turn < 30; turn++) {
        const int rows = uniform(1, 5), vocab = one_of({1, 2, 17, 300});
        std::vector<float> logits = draw<float>(size_t(rows) * vocab, 4);
        const std::vector<float> before = logits;
        const int row = uniform(0, rows - 1);
        auto some = [&](int most) {
            std::vector<int32_t> ids(uniform(0, most));
            for (int32_t& id : ids) id = uniform(0, vocab - 1);
            return ids;
        };
        std::vector<uint32_t> allowed((vocab + 31) / 32);
        for (uint32_t& word : allowed) word = uint32_t(uniform(0, 0xffff)) << 16 | uint32_t(uniform(0, 0xffff));
        const bool held = uniform(0, 1);
        Shaping s{{uniform(0, vocab - 1)}, {normal()}, some(200), some(50), 1.3, 0.7, 0.1, some(2),
                  held ? allowed.data() : nullptr, held ? allowed.size() : 0};
        std::vector<float> expected = logits;
        for (int id = 0; id < vocab; id++) {
            float& logit = expected[size_t(row) * vocab + id];
            double value = logit;
            if (id == s.biased[0]) value += s.bias[0];
            const int times = int(std::count(s.drawn.begin(), s.drawn.end(), id));
            if (times || std::count(s.seen.begin(), s.seen.end(), id)) value = value > 0 ? value / 1.3 : value * 1.3;
            if (times) value -= 0.7 + 0.1 * times;
            const bool banned = std::count(s.banned.begin(), s.banned.end(), id) || (held && !(allowed[id / 32] >> (id % 32) & 1));
            logit = banned ? -std::numeric_limits<float>::max() : float(value);
        }
        std::vector<float> kept(held ? vocab : 0);
        Shaped shaped = ops.shape({logits.data(), rows, vocab}, {row}, {&s}, kept.data());
        check(logits == expected, "shaping of one of %d rows of %d", rows, vocab);
        shaped.restore();
        check(logits == before, "shaping left something behind");
    }
}

}  // namespace
