"""Which checkpoint tensor, or which part of one, each parameter of a decoder comes from. No
tensors, only shapes.

Records of mixers and feed-forwards say which parameters there are; a Layout says what a checkpoint
calls them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from moebius.models.config import LayerSpec, ModelConfig
from moebius.nn.spec import Parameter

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Stacked:
    """One tensor for all experts, (E, parts * rows, columns): a parameter is one of the parts of
    its expert's entry.

    interleaved   the parts' rows take turns; else one part stands behind the other
    transposed    plain numbers are stored as (E, columns, parts * rows); quantised matrices are not
    """

    name: str
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False

    def source(self, parameter: str, shape: tuple[int, ...], name: str, experts: int) -> "Source":
        """Of a parameter of this shape in the tensor `name`."""
        rows = self.parts * shape[0]
        columns = shape[1:]
        turned = self.transposed and len(shape) == 2
        stored = (experts, *columns, rows) if turned else (experts, rows, *columns)
        first = self.part if self.interleaved else self.part * shape[0]
        step = self.parts if self.interleaved else 1
        return Source(parameter, shape, name, stored, start=first, step=step, transposed=turned)


@dataclass(frozen=True, slots=True)
class Joined:
    """One tensor of several parameters, whose rows stand in it in the order of their roles."""

    name: str
    roles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OfHeads:
    """What makes keys, or else values, of latents: a matrix for each head (nn/mixers/latent.py).

    apart   the tensor holds them alone, (H, C, K) or (H, V, C); else it is (H * (K + V), C), and of
            each head the first K rows are for keys, turned on their side
    """

    name: str
    keys: bool = False
    apart: bool = False

    def source(
        self,
        parameter: str,
        shape: tuple[int, ...],
        name: str,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> "Source":
        """Of a parameter of this shape in the tensor `name`; shapes: of the layer's roles."""
        key_rows, plain = shapes[KEYS_OF_LATENTS]
        value_rows, size = shapes[VALUES_OF_LATENTS]
        heads = key_rows // size
        if self.apart:
            return Source(parameter, shape, name, (heads, shape[0] // heads, shape[1]))
        whole = (heads * plain + value_rows, size)
        start = 0 if self.keys else plain
        return Source(parameter, shape, name, whole, start=start, transposed=self.keys, heads=heads)


KEYS_OF_LATENTS = "self_attn.k_b_proj.weight"
VALUES_OF_LATENTS = "self_attn.v_b_proj.weight"

Stored = str | Stacked | Joined | OfHeads
Names = Mapping[str, Stored]


def experts(
    name: str, role: str = "mlp.experts.", projections: tuple[str, str, str] = GATE_UP_DOWN
) -> Names:
    """One tensor for each matrix, and each bias: {e} in the name is the expert's number, {p} what
    the checkpoint calls gate, up and down."""
    names = {}
    for ours, theirs in zip(GATE_UP_DOWN, projections, strict=True):
        stored = name.replace("{p}", theirs)
        names[role + ours] = f"{stored}.weight"
        names[role + ours.replace("_proj", "_bias")] = f"{stored}.bias"
    return names


def stacked(gate_up: str, down: str) -> Names:
    """All experts in two tensors: (E, 2F, D), gate rows first, and (E, D, F)."""
    return {
        "mlp.experts.gate_proj": Stacked(gate_up, 0, 2),
        "mlp.experts.up_proj": Stacked(gate_up, 1, 2),
        "mlp.experts.down_proj": Stacked(down),
    }


def joined(name: str, *roles: str) -> Names:
    """One tensor for all of these."""
    return dict.fromkeys(roles, Joined(name, roles))


def transposed(gate_up: str, down: str) -> Names:
    """The same with biases, columns first, and rows of gate and up that take turns."""
    names: dict[str, str | Stacked] = {
        "mlp.experts.down_proj": Stacked(down, transposed=True),
        "mlp.experts.down_bias": Stacked(f"{down}_bias"),
    }
    for part, which in enumerate(("gate", "up")):
        whole = Stacked(gate_up, part, 2, interleaved=True, transposed=True)
        names[f"mlp.experts.{which}_proj"] = whole
        names[f"mlp.experts.{which}_bias"] = replace(whole, name=f"{gate_up}_bias")
    return names


def dense(name: str, projections: tuple[str, str, str] = GATE_UP_DOWN) -> Names:
    """A feed-forward without a router."""
    return experts(name, "mlp.", projections)


def shared(name: str, projections: tuple[str, str, str] = GATE_UP_DOWN) -> Names:
    """The expert that is always on."""
    return experts(name, "mlp.shared.", projections)


USUAL: Names = {
    **dense("mlp.{p}"),
    **experts("mlp.experts.{e}.{p}"),
    **shared("mlp.shared_expert.{p}"),
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.router.selection_bias": "mlp.gate.e_score_correction_bias",
    "mlp.router.noise_weight": "mlp.gate.noise.weight",
    KEYS_OF_LATENTS: OfHeads("self_attn.kv_b_proj.weight", keys=True),
    VALUES_OF_LATENTS: OfHeads("self_attn.kv_b_proj.weight"),
    "mlp.shared_gate.weight": "mlp.shared_expert_gate.weight",
}
FUSED = stacked("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""As transformers 5 holds them, for most types."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What one kind of checkpoint calls a decoder's parameters.

    names      by their role in a layer (moebius.nn.spec.Parameter), where the checkpoint has
               another name than most: see USUAL. A role that is in neither is the tensor's name
    layer      stands before these; {i} is the layer's number
    centred    zero-centred norms are stored as such; else the 1 has been added to their weights
    embedding, norm, head   whole names. embedding is the head's, where that alone is stored and
                            serves as both
    encoder_norm            the same of the norm behind an encoder, where there is one
    copies                  whole names that the embedding may have beside its own
    """

    names: Names = field(default_factory=dict)
    layer: str = "model.layers.{i}."
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    centred: bool = True
    encoder_norm: str = ""
    copies: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """What stands before all names but the head's, unless a model was saved without a head."""
        return self.embedding.partition(".")[0] + "."

    def of_layer(self, config: ModelConfig, number: int) -> "Layout":
        """The layout of one layer, where kinds of layers are called otherwise."""
        return self

    def source(
        self, number: int, parameter: Parameter, shapes: Mapping[str, tuple[int, ...]]
    ) -> "Source":
        """Where a parameter of layer `number` is, whose roles have these shapes."""
        name, shape, role, expert, experts, float32, _ = parameter
        role = role or name
        stored = self.names.get(role) or USUAL.get(role) or role
        before = self.layer.replace("{i}", str(number))
        ours = f"layers.{number}.{name}"
        whose = None if expert is None else (number, expert)
        if isinstance(stored, str):
            theirs = before + stored.replace("{e}", str(expert))
            return Source(ours, shape, theirs, shape, None, 0, float32, whose)
        if isinstance(stored, Joined):
            above = [shapes[each][0] for each in stored.roles]
            whole = (sum(above), *shape[1:])
            first = sum(above[: stored.roles.index(role)])
            return Source(ours, shape, before + stored.name, whole, None, first, float32)
        if isinstance(stored, OfHeads):
            return stored.source(ours, shape, before + stored.name, shapes)
        found = stored.source(ours, shape, before + stored.name, experts)
        return found._replace(entry=expert, float32=float32, expert=whose)


def switched(layout: Layout) -> Layout | None:
    """The same with all experts' matrices of one kind in one tensor, as mlx-lm has them; None where
    they are not one by one in `layout`."""
    names = dict(layout.names)
    for ours in GATE_UP_DOWN:
        role = f"mlp.experts.{ours}"
        stored = layout.names.get(role, USUAL[role])
        before, numbered, _ = str(stored).partition("experts.{e}.")
        if not numbered:
            return None
        names[role] = Stacked(f"{before}switch_mlp.{ours}.weight")
    return replace(layout, names=names)


class Source(NamedTuple):
    """Where a parameter's values are: a whole tensor, some rows of one, or of entry `entry` of a
    stacked one: every step-th from `start` on.

    shape is the parameter's, stored_shape the checkpoint tensor's. A parameter that is float32
    stays so in any model. expert is whose it is in which layer, where it belongs to one of several
    experts. added is what a parameter is more than what is stored. transposed: the entry is stored
    columns first, so that its rows are what stands below one another. heads: where there are any,
    the tensor has as many equal parts, and the parameter is some rows of each, one below the other;
    transposed, they are turned part by part.
    """

    parameter: str
    shape: tuple[int, ...]
    name: str
    stored_shape: tuple[int, ...]
    entry: int | None = None
    start: int = 0
    float32: bool = False
    expert: tuple[int, int] | None = None
    added: float = 0.0
    step: int = 1
    transposed: bool = False
    heads: int = 0

    @property
    def scattered(self) -> bool:
        """Whether its numbers do not lie one after another."""
        return self.step != 1 or self.transposed or self.heads > 0

    @property
    def takes_turns(self) -> bool:
        """Whether its rows and those of another matrix of the same expert do."""
        return self.expert is not None and self.step == 2 and not self.transposed

    @property
    def rows(self) -> tuple[int, int, int]:
        """Start, stop and step of its rows among those of its entry, or of the whole tensor."""
        return self.start, self.start + self.shape[0] * self.step, self.step

    @property
    def of_codes(self) -> "Source":
        """The same where the tensor is a quantised matrix, whose rows lie as rows."""
        if not self.transposed or self.heads:
            return self
        entries, columns, rows = self.stored_shape
        return self._replace(stored_shape=(entries, rows, columns), transposed=False)

    @property
    def in_order(self) -> "Source":
        """The same where the tensor is written anew: row by row, one part behind the other; of
        heads' matrices each kind as a tensor of its own."""
        if self.heads:
            name = f"{self.name} of {'keys' if self.transposed else 'values'}"
            return Source(self.parameter, self.shape, name, self.shape)
        start = self.start * self.shape[0] if self.step > 1 else self.start
        return self.of_codes._replace(start=start, step=1)


def _whole(parameter: str, name: str, *shape: int) -> Source:
    return Source(parameter, shape, name, shape)


def _of_norm(source: Source, config: ModelConfig, layout: Layout) -> Source:
    """A norm's weight, as all of the model's are held."""
    if config.norm == "rounded":
        return source
    added = 1.0 if config.norm == "zero-centred" and layout.centred else 0.0
    return source._replace(float32=True, added=added)


def sources(config: ModelConfig, layout: Layout) -> Iterator[Source]:
    """One Source for each parameter of Decoder(config)."""
    width = config.hidden_size
    yield _whole("embed_tokens.weight", layout.embedding, config.vocab_size, width)
    # Most layers are like another, and hundreds of experts make many parameters.
    parameters: dict[LayerSpec, tuple[Parameter, ...]] = {}
    for number, layer in enumerate(config.layers):
        if layer not in parameters:
            parameters[layer] = tuple(layer.parameters(width))
        shapes = {each.role or each.name: each.shape for each in parameters[layer]}
        named = layout.of_layer(config, number)
        for parameter in parameters[layer]:
            source = named.source(number, parameter, shapes)
            yield _of_norm(source, config, layout) if parameter.norm else source
    yield _of_norm(_whole("norm.weight", layout.norm, width), config, layout)
    if config.encoder_layers:
        stored = _whole("encoder_norm.weight", layout.encoder_norm, width)
        yield _of_norm(stored, config, layout)
    if not config.tie_word_embeddings:
        yield _whole("lm_head.weight", layout.head, config.vocab_size, width)
