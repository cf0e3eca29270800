"""What the figures say in a few sentences: is it balanced, is anything dead, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

# MaxVio up to which load counts as even, and as merely uneven: trained with a balance loss, models of 1 to 3 billion
# parameters end at 0.5 to 0.7, with the bias update at 0.04 (arXiv 2408.15664 table 2).
EVEN, UNEVEN = 0.5, 1.0
# Information about the token, of at most ln E, below which a router hardly looks; |logit| beyond which it is too loud.
_BLIND, _LOUD = 0.02, 50.0
_NOISY_FLOOR = 0.15

State = Literal["good", "fair", "poor", "note"]


class Finding(NamedTuple):
    """One sentence or two, and how good the news is."""

    state: State
    text: str


def _balance(layers: Sequence[dict[str, Any]], floor: float) -> Finding:
    worst = max(layers, key=lambda layer: layer["max_violation"])
    value = worst["max_violation"]
    state: State = "good" if value <= EVEN else "fair" if value <= UNEVEN else "poor"
    word = {"good": "The load is even", "fair": "The load is uneven", "poor": "The load is unbalanced"}[state]
    text = (
        f"{word}: at worst, in layer {worst['layer']}, the busiest expert gets {1 + value:.2f} times an even share "
        f"(MaxVio {value:.2f}; random routing would give {floor:.2f})."
    )
    if state != "good":
        text += (
            " Train on with more balance loss (a weight of 0.01 is usual) or the bias update; serve it placed by load."
        )
    return Finding(state, text)


def _dead(layers: Sequence[dict[str, Any]], experts: int) -> Finding:
    dead = {layer["layer"]: layer["dead"] for layer in layers if layer["dead"]}
    if not dead:
        return Finding("good", "No expert is dead: each gets at least a tenth of an even share.")
    where = "; ".join(f"layer {layer}: {', '.join(map(str, each))}" for layer, each in list(dead.items())[:4])
    more = " and more" if len(dead) > 4 else ""
    number = sum(map(len, dead.values()))
    return Finding(
        "poor",
        f"{number} of {experts * len(layers)} experts are dead, with under a tenth of an even share ({where}{more}). "
        "They take memory and do nothing for this text: try other text, or train on with a stronger balance loss.",
    )


def _router(layers: Sequence[dict[str, Any]], most: float) -> list[Finding]:
    found = []
    least = min(layers, key=lambda layer: layer["mutual_information"])
    share = least["mutual_information"] / most if most else 1.0
    if share < _BLIND:
        text = f"The router of layer {least['layer']} hardly looks at the token: it tells {share:.1%} of what it could."
        found.append(Finding("poor", text))
    else:
        text = f"Routers tell tokens apart: the choice of expert tells at least {share:.0%} of what it could tell."
        found.append(Finding("good", text))
    loudest = max(layers, key=lambda layer: layer["largest_logit"])
    if loudest["largest_logit"] > _LOUD:
        value = loudest["largest_logit"]
        text = f"Router logits of layer {loudest['layer']} reach {value:.0f}: train with a z-loss of weight 0.001."
        found.append(Finding("fair", text))
    return found


def _notes(report: dict[str, Any]) -> list[Finding]:
    layers, found = report["layers"], []
    changed = max(layers, key=lambda layer: layer["bfloat16_changed"])
    if changed["bfloat16_changed"] >= 0.001:
        text = (
            "Keep the router in float32, as Moebius does: in bfloat16 "
            f"{changed['bfloat16_changed']:.1%} of the tokens of layer {changed['layer']} would change experts."
        )
        found.append(Finding("note", text))
    if report["placement"]:
        row = report["placement"][-1]
        plain, balanced, copied = (max(row[name]) for name in ("plain", "balanced", "replicated"))
        text = (
            f"Over {row['ranks']} ranks the busiest does {plain:.2f} times the mean in the worst layer; "
            f"{balanced:.2f} when experts are placed by load, {copied:.2f} with a replica more on each rank."
        )
        found.append(Finding("note", text))
    if against := report["against"]:
        low = min(against["saturation"])
        chance = against["chance"]
        text = (
            f"In every layer at least {low:.0%} of the choices are those of {against['model']} (chance: {chance:.0%})."
        )
        found.append(Finding("note", text))
    return found


def verdict(report: dict[str, Any]) -> list[Finding]:
    """The findings, the first of them on balance."""
    layers, router = report["layers"], report["router"]
    found = [
        _balance(layers, report["floor"]),
        _dead(layers, router["num_experts"]),
        *_router(layers, router["greatest_entropy"]),
        *_notes(report),
    ]
    if report["floor"] > _NOISY_FLOOR:
        text = f"{report['text']['run']:,} tokens are few for {router['num_experts']} experts: give it more text."
        found.append(Finding("fair", text))
    return found
