"""Running rows through a decoder, and the sums that its routers leave.

Memory does not grow with the text. Shape legend: S steps, M layers with a router, T tokens of a
step, E experts, K experts a token, X tracked vocabulary, C kinds of text.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from moebius.errors import ConfigError
from moebius.inspect.corpus import Rows
from moebius.models.decoder import Decoder
from moebius.models.encoder_decoder import packed_past
from moebius.moe import health
from moebius.moe.losses import chosen_counts
from moebius.moe.router import Router, Routing
from moebius.ops.config import RouterConfig
from moebius.ops.reference.routing import router_probabilities
from moebius.progress import Progress, silent

# Counters that the vocabulary may take, two of 4 bytes each: the commonest ids have them.
_VOCABULARY_COUNTERS = 2**25
_NEVER = torch.iinfo(torch.int32).max
# How often an id must occur to be tracked (OLMoE, arXiv 2409.02060 section 5.4).
_OFTEN = 10


def routers(decoder: Decoder) -> dict[int, Router]:
    """The routers by layer.

    Raises ConfigError for a dense model, or one whose routers differ in size.
    """
    found = decoder.routers
    if not found:
        raise ConfigError(
            f"this {decoder.config.model_type} model is dense: it has no router to inspect"
        )
    sizes = {(router.config.num_experts, router.config.top_k) for router in found.values()}
    if len(sizes) > 1:
        raise ConfigError(
            f"layers of different routers, (experts, top_k) = {sorted(sizes)}, cannot be inspected"
        )
    [(num_experts, _)] = sizes
    if num_experts == 1:
        raise ConfigError("the routers have a single expert each: there is no choice to inspect")
    return found


class Tally:
    """What is kept of a run over `rows`: counts and sums for each layer with a router.

    counts_SME   (token, choice) pairs, step by step
    sums         by name, over tokens (M,): entropy, confidence, margin, z, bfloat16_changed; with a
                 second checkpoint overlap, overlap_first, variation; distinct_W over runs of W
                 consecutive tokens
    p_ME         router probabilities, summed         largest_M    greatest absolute logit
    together_MEE co-activation          kinds_MEC     tokens of each kind that chose e
    tokens_MEX   tokens of each tracked id that chose e        example_MEX  place in shuffled_N of
                 one of them
    """

    def __init__(self, rows: Rows, layers: int, router: RouterConfig, device: torch.device) -> None:
        self.rows = rows
        self.num_layers = layers
        self.router = router
        self.device = device
        self.seen = 0
        experts = router.num_experts
        counts_V = torch.bincount(rows.tokens_N)
        most = max(1, _VOCABULARY_COUNTERS // (layers * experts))
        common = torch.argsort(counts_V, descending=True, stable=True)[:most]
        self.tracked_X = common[counts_V[common] >= _OFTEN]
        self.tracked_tokens_X = counts_V[self.tracked_X]
        # Where each id is among the tracked ones, -1 for the others.
        self._index_V = torch.full(counts_V.shape, -1)
        self._index_V[self.tracked_X] = torch.arange(len(self.tracked_X))

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(layers, *shape, dtype=dtype, device=device)

        self._zeros = zeros
        self.counts_SME: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}
        self.p_ME = zeros(experts)
        self.largest_M = zeros()
        self.other_counts_ME = zeros(experts, dtype=torch.int64)
        self.together_MEE = zeros(experts, experts, dtype=torch.int64)
        self.kinds_MEC = zeros(experts, len(rows.kinds), dtype=torch.int64)
        self.tokens_MEX = zeros(experts, len(self.tracked_X), dtype=torch.int32)
        self.example_MEX = self.tokens_MEX + _NEVER
        generator = torch.Generator().manual_seed(0)
        self.shuffled_N = torch.randperm(len(rows.tokens_N), generator=generator)
        self._place_N = torch.argsort(self.shuffled_N).int()

    @property
    def counts_ME(self) -> Tensor:
        return torch.stack(self.counts_SME).sum(0)

    def mean(self, name: str) -> Tensor:
        """The mean over tokens (M,), on the CPU."""
        return self.sums[name].cpu() / self.seen

    def _add(self, name: str, m: int, values_T: Tensor) -> None:
        self.sums.setdefault(name, self._zeros())[m] += values_T.double().sum()

    def begin(self, tokens: int) -> None:
        """A step over the next `tokens` tokens of the rows begins."""
        self._step = slice(self.seen, self.seen + tokens)
        counts_ME = torch.zeros(self.num_layers, self.router.num_experts, dtype=torch.int64)
        self.counts_SME.append(counts_ME)
        self.seen += tokens

    def see(self, m: int, module: Router, inputs: tuple[Tensor], routing: Routing) -> None:
        """A forward hook of router m: add what it made of the step's tokens."""
        ids_TK = routing.expert_ids_TK
        experts = self.router.num_experts
        self.counts_SME[-1][m] = chosen_counts(routing)[0].cpu()
        p_TE = router_probabilities(routing.logits_TE, module.config)
        self.p_ME[m] += p_TE.double().sum(0)
        self._add("entropy", m, health.entropy(p_TE))
        self._add("confidence", m, p_TE.amax(-1))
        self._add("margin", m, health.margin(p_TE))
        self._add("z", m, torch.logsumexp(routing.logits_TE, -1).square())
        self.largest_M[m] = torch.maximum(self.largest_M[m], routing.logits_TE.abs().amax())
        half_TK = health.routed_in_bfloat16(
            *inputs, module.weight, module.bias, module.config, module.selection_bias
        )
        self._add("bfloat16_changed", m, health.overlap(ids_TK, half_TK) < 1)
        self.together_MEE[m] += health.coactivation(ids_TK, experts)
        for row_LK in torch.split(ids_TK, self.rows.length):
            for width, distinct in health.distinct_in_windows(row_LK, experts):
                self._add(f"distinct_{width}", m, distinct)
        self._count_classes(m, ids_TK)

    def _count_classes(self, m: int, ids_TK: Tensor) -> None:
        tokens_T = self.rows.tokens_N[self._step].long()
        tracked_T = self._index_V[tokens_T].to(self.device)
        kind_T = self.rows.kind_N[self._step].to(self.device)
        place_T = self._place_N[self._step].to(self.device)
        known = tracked_T >= 0
        kind_pairs = (ids_TK * self.kinds_MEC.shape[2] + kind_T.unsqueeze(1)).flatten()
        pairs = (ids_TK[known] * len(self.tracked_X) + tracked_T[known].unsqueeze(1)).flatten()
        self.kinds_MEC[m].view(-1).index_add_(0, kind_pairs, torch.ones_like(kind_pairs))
        self.tokens_MEX[m].view(-1).index_add_(0, pairs, torch.ones_like(pairs, dtype=torch.int32))
        places = place_T[known].repeat_interleave(ids_TK.shape[1])
        self.example_MEX[m].view(-1).scatter_reduce_(0, pairs, places, "amin")

    def compare(self, routings: Sequence[Routing], others: Sequence[Routing]) -> None:
        """Add how far another checkpoint's routers agree about the step's tokens."""
        for m, (ours, theirs) in enumerate(zip(routings, others, strict=True)):
            self._add("overlap", m, health.overlap(ours.expert_ids_TK, theirs.expert_ids_TK))
            self._add("overlap_first", m, ours.expert_ids_TK[:, 0] == theirs.expert_ids_TK[:, 0])
            p_TE = router_probabilities(ours.logits_TE, self.router)
            q_TE = router_probabilities(theirs.logits_TE, self.router)
            self._add("variation", m, health.total_variation(p_TE, q_TE))
            self.other_counts_ME[m] += chosen_counts(theirs)[0].long()


@torch.inference_mode()
def collect(
    decoder: Decoder,
    rows: Rows,
    step_tokens: int,
    against: Decoder | None = None,
    progress: Progress = silent,
) -> Tally:
    """Run all rows through the decoder, some `step_tokens` at a time.

    `against`, another checkpoint of its shape, sees the same tokens.
    """
    found = routers(decoder)
    device = decoder.device
    tally = Tally(rows, len(found), next(iter(found.values())).config, device)
    step = max(1, step_tokens // rows.length) * rows.length
    starts = range(0, len(rows.tokens_N), step)

    def forward(model: Decoder, tokens_T: Tensor, document_T: Tensor) -> list[Routing]:
        positions_T = torch.arange(rows.length, device=device).repeat(len(tokens_T) // rows.length)
        past = packed_past(model, rows.length, document_T)
        _, routings = model(tokens_T.long(), positions_T, past)
        return [routing for routing in routings if routing is not None]

    with ExitStack() as stack:
        # A hook sees a router's input while it is there; those of all layers together are large.
        for m, router in enumerate(found.values()):
            stack.callback(router.register_forward_hook(partial(tally.see, m)).remove)
        advance = stack.enter_context(progress("inspecting", len(starts)))
        for start in starts:
            tokens_T = rows.tokens_N[start : start + step].to(device)
            document_T = rows.document_N[start : start + step].to(device)
            tally.begin(len(tokens_T))
            routings = forward(decoder, tokens_T, document_T)
            if against is not None:
                tally.compare(routings, forward(against, tokens_T, document_T))
            advance(1)
    return tally
