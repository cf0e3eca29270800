"""The figures against routings that transformers computes, counted by plain loops over tokens."""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from moebius.inspect.config import InspectConfig
from moebius.inspect.corpus import Rows, make_rows, read_documents
from moebius.inspect.run import write_report
from moebius.text import Tokenizer
from oracle import save_tiny
from tiny import write_model, write_tokenizer

from .conftest import SETTINGS

E, K, L = 4, 2, 64


def rows_of(model: Path, corpus: Path) -> Rows:
    return make_rows(read_documents([corpus], 2000), Tokenizer.load(model), L, 2000)


def routed_by_transformers(model: Path, rows: Rows) -> list[torch.Tensor]:
    """Router logits (N, E) of each layer; each document's part of a row is a call of its own."""
    theirs = AutoModelForCausalLM.from_pretrained(model).eval()
    pieces: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for start in range(0, len(rows.tokens_N), L):
            documents = rows.document_N[start : start + L]
            for document in documents.unique_consecutive():
                at = (documents == document).nonzero().flatten()
                ids = rows.tokens_N[start + at].long().unsqueeze(0)
                out = theirs(ids, position_ids=at.unsqueeze(0), output_router_logits=True)
                for layer, logits in enumerate(out.router_logits):
                    pieces[layer].append(logits)
    return [torch.cat(layer) for layer in pieces]


@pytest.fixture(scope="module")
def rows(tiny_model: Path, corpus: Path) -> Rows:
    return rows_of(tiny_model, corpus)


@pytest.fixture(scope="module")
def logits(tiny_model: Path, rows: Rows) -> list[torch.Tensor]:
    return routed_by_transformers(tiny_model, rows)


def chosen(logits_TE: torch.Tensor) -> list[list[int]]:
    return logits_TE.topk(K).indices.tolist()


def test_load_and_router_figures(report: dict[str, Any], logits: list[torch.Tensor]) -> None:
    for found, logits_TE in zip(report["layers"], logits, strict=True):
        counts = Counter(e for ids in chosen(logits_TE) for e in ids)
        assert found["counts"] == [counts[e] for e in range(E)]
        assert found["max_violation"] == pytest.approx(
            max(counts.values()) / (counts.total() / E) - 1, abs=1e-4
        )
        # Multiples of the even share, as the page shows them, agree with MaxVio in every digit shown.
        shares = [counts[e] / counts.total() for e in range(E)]
        assert [E * load for load in found["load"]] == pytest.approx(
            [E * s for s in shares], abs=1e-5
        )
        p = logits_TE.softmax(-1).double()
        entropy = sum(-x * math.log(x) for row in p.tolist() for x in row) / len(p)
        mean = sum(-x * math.log(x) for x in p.mean(0).tolist())
        assert found["router_entropy"] == pytest.approx(entropy, abs=1e-3)
        assert found["mutual_information"] == pytest.approx(mean - entropy, abs=1e-3)
        ordered = [sorted(row, reverse=True) for row in p.tolist()]
        assert found["confidence"] == pytest.approx(sum(r[0] for r in ordered) / len(p), abs=1e-3)
        assert found["margin"] == pytest.approx(
            sum(r[0] - r[1] for r in ordered) / len(p), abs=1e-3
        )
        assert found["largest_logit"] == pytest.approx(logits_TE.abs().max().item(), abs=1e-3)
        assert found["z"] == pytest.approx(logits_TE.logsumexp(-1).square().mean().item(), abs=1e-3)


def test_steps_pairs_and_capacity(report: dict[str, Any], logits: list[torch.Tensor]) -> None:
    for m, logits_TE in enumerate(logits):
        ids = chosen(logits_TE)
        violations, dropped = [], defaultdict(list)
        for start in range(0, len(ids), 256):
            counts = Counter(e for row in ids[start : start + 256] for e in row)
            even = counts.total() / E
            violations.append(max(counts.values()) / even - 1)
            for factor in report["capacity_factors"]:
                over = sum(max(0, count - int(factor * even)) for count in counts.values())
                dropped[factor].append(over / counts.total())
        found = report["layers"][m]
        assert found["max_violation_step"] == pytest.approx(
            sum(violations) / len(violations), abs=1e-4
        )
        means = [sum(each) / len(each) for each in dropped.values()]
        assert found["dropped"] == pytest.approx(means, abs=1e-4) and means[0] > 0
        met, alone = Counter(frozenset(row) for row in ids), Counter(e for row in ids for e in row)
        share = report["coactivation"][m]["share"]
        for i in range(E):
            expected = [0.0 if i == j else met[frozenset((i, j))] / alone[i] for j in range(E)]
            assert share[i] == pytest.approx(expected, abs=1e-4)


def test_what_experts_like(
    report: dict[str, Any], rows: Rows, logits: list[torch.Tensor], tiny_model: Path
) -> None:
    tokens, tokenizer = rows.tokens_N.tolist(), Tokenizer.load(tiny_model)
    kinds = [rows.documents[d][1] for d in rows.document_N.tolist()]
    assert report["text"]["kinds"] == dict(Counter(kinds).most_common())
    liked = 0
    for m, logits_TE in enumerate(logits):
        of_token, of_expert, of_kind = Counter[Any](), Counter[int](), Counter[Any]()
        ids_of = chosen(logits_TE)
        for token, kind, ids in zip(tokens, kinds, ids_of, strict=True):
            of_token.update((e, token) for e in ids)
            of_kind.update((e, kind) for e in ids)
            of_expert.update(ids)
        often = {token for token, count in Counter(tokens).items() if count >= 10}
        tracked_share = {
            e: sum(of_token[e, t] for t in often) / sum(Counter(tokens)[t] for t in often)
            for e in range(E)
        }
        for taste in report["tastes"][m]["experts"]:
            e = taste["expert"]
            for c, kind in enumerate(report["text"]["kinds"]):
                lift = of_kind[e, kind] / Counter(kinds)[kind] / (of_expert[e] / len(tokens))
                assert report["tastes"][m]["kind_lift"][e][c] == pytest.approx(lift, abs=2e-3)
            for token in taste["tokens"]:
                number = Counter(tokens)[token["id"]]
                assert token["id"] in often and token["count"] == of_token[e, token["id"]]
                assert token["lift"] == pytest.approx(
                    token["count"] / number / tracked_share[e], abs=0.01
                )
                assert token["lift"] >= 1.5
                came = [i for i, t in enumerate(tokens) if t == token["id"] and e in ids_of[i]]
                places = {
                    (*rows.context(i, tokenizer), rows.documents[int(rows.document_N[i])][0])
                    for i in came
                }
                assert (*token["example"], token["document"]) in places
                liked += 1
        best = [max(of_token[e, t] for e in range(E)) / Counter(tokens)[t] for t in often]
        assert report["tastes"][m]["vocabulary_specialisation"] == pytest.approx(
            sum(best) / len(best), abs=1e-3
        )
    assert liked >= 20


def test_distinct_experts(report: dict[str, Any], logits: list[torch.Tensor]) -> None:
    for row in report["distinct"]:
        batch = row["batch"]
        assert row["uniform"] == pytest.approx(E * (1 - (1 - K / E) ** batch), abs=1e-3)
        if batch > L:
            assert row["one_text"] is None
            continue
        found = []
        for logits_TE in logits:
            ids = chosen(logits_TE)
            found += [
                len({e for r in ids[i : i + batch] for e in r}) for i in range(0, len(ids), batch)
            ]
        assert row["one_text"] == pytest.approx(sum(found) / len(found), abs=1e-3)
    assert report["distinct"][0]["load"] == pytest.approx(K)


def test_placement_is_judged_on_other_steps(
    report: dict[str, Any], logits: list[torch.Tensor]
) -> None:
    (row,) = report["placement"]
    assert row["ranks"] == 2 and row["slots"] == 6
    for m, logits_TE in enumerate(logits):
        ids = chosen(logits_TE)
        steps = [Counter(e for r in ids[i : i + 256] for e in r) for i in range(0, len(ids), 256)]
        for way in ("plain", "balanced", "replicated"):
            held = row[f"{way}_experts"][m]
            copies = Counter(e for rank in held for e in rank)
            assert set(copies) == set(range(E)) and copies.total() == (
                6 if way == "replicated" else E
            )
            each = []
            for counts in steps[1::2]:
                loads = [sum(counts[e] / copies[e] for e in rank) for rank in held]
                each.append(max(loads) / (sum(loads) / 2))
            assert row[way][m] == pytest.approx(sum(each) / len(each), abs=1e-4)
        assert row["plain_experts"][m] == [[0, 1], [2, 3]]


def test_another_checkpoint(
    tiny_model: Path, corpus: Path, rows: Rows, logits: list[torch.Tensor], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write_model(other, seed=1)
    documents = read_documents([corpus], 2000)
    found = write_report(tiny_model, documents, tmp_path / "out", SETTINGS, against=other)[
        "against"
    ]
    for m, (ours, theirs) in enumerate(
        zip(logits, routed_by_transformers(other, rows), strict=True)
    ):
        same = [len(set(a) & set(b)) / K for a, b in zip(chosen(ours), chosen(theirs), strict=True)]
        first = [a[0] == b[0] for a, b in zip(chosen(ours), chosen(theirs), strict=True)]
        moved = (ours.softmax(-1) - theirs.softmax(-1)).abs().sum(-1).mean() / 2
        assert found["saturation"][m] == pytest.approx(sum(same) / len(same), abs=1e-4)
        assert found["saturation_first"][m] == pytest.approx(sum(first) / len(first), abs=1e-4)
        assert found["variation"][m] == pytest.approx(moved.item(), abs=1e-3)
    itself = write_report(tiny_model, documents, tmp_path / "out", SETTINGS, against=tiny_model)[
        "against"
    ]
    assert itself["saturation"] == itself["saturation_first"] == [1.0, 1.0]
    assert itself["variation"] == itself["load_variation"] == itself["router_change"] == [0.0, 0.0]


def test_the_figures_do_not_depend_on_the_step(
    tiny_model: Path, corpus: Path, report: dict[str, Any], tmp_path: Path
) -> None:
    documents = read_documents([corpus], 2000)
    whole = write_report(
        tiny_model, documents, tmp_path, InspectConfig(2000, L, step_tokens=10_000)
    )
    assert whole["run"]["steps"] == 1 and report["run"]["steps"] > 4
    for a, b in zip(whole["layers"], report["layers"], strict=True):
        assert a["counts"] == b["counts"]
        assert a["router_entropy"] == pytest.approx(b["router_entropy"], abs=1e-3)
    assert json.loads(json.dumps(whole["tastes"])) == report["tastes"]


def test_routers_behind_states_are_seen_document_by_document(corpus: Path, tmp_path: Path) -> None:
    """Of a model whose layers recur: each document's part of a row begins with a state of zeros."""
    model = tmp_path / "model"
    model.mkdir()
    sizes = {"vocab_size": 320, "num_experts": E, "moe_intermediate_size": 16}
    save_tiny(model, "qwen3_5_moe_text", **sizes)
    write_tokenizer(model)
    found = write_report(model, read_documents([corpus], 2000), tmp_path / "out", SETTINGS)
    logits = routed_by_transformers(model, rows_of(model, corpus))
    assert len(found["layers"]) == 2
    test_load_and_router_figures(found, logits)
