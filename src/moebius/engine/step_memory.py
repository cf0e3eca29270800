"""What a step takes beside weights and cache, and what is known of that before it is planned."""

from dataclasses import replace
from typing import NamedTuple

from moebius.engine.config import EngineConfig
from moebius.models.config import ModelConfig
from moebius.ops.sampling import ROWS_AT_ONCE
from moebius.request.params import LIMITS

# Rows of logits that prompt log-probabilities are computed from at a time.
PROMPT_LOGIT_ROWS = 64
# Ids that sampling holds at a time (candidates, or those that penalties name), but for one row's
# that has more.
SAMPLED_IDS = 2**16
# What an id of a vocabulary takes in its tokenizer and in llguidance's, which the first grammar
# makes: 1,510 to 1,880 bytes in byte-level ones of 32,000 to 256,000 ids. Below so many ids that is
# less than a process takes by chance.
_GRAMMAR_BYTES = 2_000
_LARGE_VOCABULARY = 2**15
# Assumed of a step's graph of some thousand launches; and of one of a few, as logits are, or of
# what each further piece of a step adds. No card has been asked yet.
_GRAPH_BYTES = 2**23
_SMALL_GRAPH_BYTES = 2**17
_FLOAT32 = 4
_INT64 = 8


class StepMemory(NamedTuple):
    """What is known of a step before it is planned, in bytes.

    recorded   what its programs take, where they are recorded; None: that is to be estimated
    scratch    what operations keep beside that
    pieces     how many graphs a step of a device is to be in; 0: it is not captured
    """

    recorded: int | None = None
    scratch: int = 0
    pieces: int = 0


def workspace_bytes(model: ModelConfig, engine: EngineConfig, itemsize: int, ranks: int = 1) -> int:
    """Bound on what one step allocates: the activations of its widest moment, and its logits.

    T tokens pass each layer: hidden states, residual and norm; q, k, v and attention's output, in
    float32 inside the kernels; or (token, expert) rows of the feed-forward, of all ranks' tokens
    where several share the experts. Then L rows of logits.
    Beside them lie at first the parts that plain PyTorch puts them together from, then what
    sampling needs.
    """
    tokens = engine.max_num_batched_tokens
    hidden = 4 * model.hidden_size * _FLOAT32
    attention = 2 * max((mixer.activations for mixer in model.mixers), default=0) * _FLOAT32
    widest = max(
        (
            (part.router.top_k * ranks if part.router else 1)
            * (3 * part.width + 2 * model.hidden_size)
            + 3 * part.shared_width
            for part in model.feed_forward
        ),
        default=0,
    )
    scores = max((mixer.scores for mixer in model.mixers), default=0) * tokens
    scores *= (engine.max_model_len or 0) * _FLOAT32
    logits = logit_rows(engine) * model.vocab_size * _FLOAT32
    beside = max(logits, sampling_bytes(model.vocab_size, engine.max_model_len or 0))
    activations = tokens * (hidden + max(attention, widest * max(itemsize, _FLOAT32)))
    return activations + min(scores, 2**28) + logits + beside


def exchange_bytes(model: ModelConfig, tokens: int, ranks: int, itemsize: int) -> int:
    """The most that a step of so many tokens sends to other ranks and gets back from them.

    A token's row and its ids go once to each rank that computes any of its choices; a row for each
    choice comes back. Logits that ranks make together are not counted: they stay on a host.
    """
    total = 0
    for part in model.feed_forward:
        if part.router is not None and ranks > 1:
            top_k = part.router.top_k
            row = model.hidden_size * itemsize
            total += min(top_k, ranks - 1) * (row + top_k * _INT64) + top_k * row
    return tokens * total


def logit_rows(engine: EngineConfig) -> int:
    """The most rows whose logits exist at a time."""
    return max(engine.max_num_seqs, PROMPT_LOGIT_ROWS)


def sampling_bytes(vocab_size: int, max_model_len: int) -> int:
    """Bound on what sampling allocates beside the logits, whatever a step's requests ask for.

    Rows that ask for many ids take turns (SAMPLED_IDS); one row asks for at most the vocabulary as
    candidates, or its context as tokens to penalise. An id takes up to 64 bytes: among candidates
    itself, twice while they are sorted, and its logit; under a penalty itself, where it is found,
    five numbers of what changes, and the logit that it had. Beyond that plain PyTorch widens a few
    rows at a time, and a draw one row's candidates, to eight numbers of eight bytes an id.
    """
    ids = max(SAMPLED_IDS, vocab_size, max_model_len + LIMITS.logit_bias + LIMITS.stop_token_ids)
    return 64 * ids + ROWS_AT_ONCE * vocab_size * 8 * _INT64


def graph_pieces(model: ModelConfig, *, whole: bool) -> int:
    """How many graphs a captured step is at most: one if it is `whole`; else some of its experts
    are elsewhere, and a layer with experts calls the host twice. None of an encoder's prompts are
    captured."""
    if model.encoder_layers:
        return 0
    return 1 if whole else 1 + 2 * len(model.experts)


def graph_bytes(model: ModelConfig, engine: EngineConfig, pieces: int = 1) -> int:
    """Bound on what captured steps take: the activations of their widest, which have memory of
    their own; where results lie, of all programs; and what a driver keeps of each graph. Of steps
    in pieces, where rows cross to the host and back, too; and every other size alone is captured.
    """
    if not pieces:
        return 0
    sequences = engine.max_num_seqs
    own = replace(engine, max_num_batched_tokens=sequences)
    results = engine.max_num_batched_tokens * model.hidden_size
    results += logit_rows(engine) * model.vocab_size
    heads = logit_rows(engine).bit_length() + 1
    steps = sequences.bit_length() + 1
    crossing = 0
    if pieces > 1:
        steps = steps // 2 + 1
        crossing = sequences * _crossing_bytes(model)
    graphs = steps * _GRAPH_BYTES + (heads + steps * (pieces - 1)) * _SMALL_GRAPH_BYTES
    activations = workspace_bytes(model, own, _FLOAT32)
    return activations + results * _FLOAT32 + crossing + graphs


def _crossing_bytes(model: ModelConfig) -> int:
    """Of a row at the places where it crosses: itself, an answer for each choice there and back,
    and its choices, as often."""
    top_k = max((part.router.top_k for part in model.feed_forward if part.router), default=0)
    row = model.hidden_size * _FLOAT32
    return row + 2 * top_k * row + 4 * top_k * _INT64


def grammar_bytes(vocab_size: int, device: str) -> int:
    """What following grammars takes, beside little for each."""
    counted = device == "cpu" and vocab_size >= _LARGE_VOCABULARY
    return _GRAMMAR_BYTES * vocab_size if counted else 0


def step_workspace(
    model: ModelConfig, engine: EngineConfig, itemsize: int, ranks: int, step: StepMemory
) -> int:
    """As it was recorded, or an estimate; and what operations keep beside it."""
    if step.recorded is None:
        return workspace_bytes(model, engine, itemsize, ranks) + step.scratch
    sampling = sampling_bytes(model.vocab_size, engine.max_model_len or 0)
    return step.recorded + sampling + step.scratch
