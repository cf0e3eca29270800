"""Which keys of config.json transformers reads, and what absent ones mean: the tables beside the
families in src/moebius/models/families.

    PYTHONPATH=src:tests python -m models.config_keys [model_type ...]

writes them anew, all of them or these, from the transformers that is installed, the one that
constraints.txt pins; a test compares the two. The package reads the tables alone. That of a
model_type holds

    read        what the model, or code that it shares with all others, looks up in its
                configuration: by syntax, in the sources below. Its value is what an absent key
                means there: the field's default, or getattr's
    never_null  fields whose annotation does not admit null; elsewhere null is a value of its own
    aliases     other names of fields (the class's attribute_map)

and rope_keys.json, above them, which entries of rope_parameters the frequencies of each rope type
depend on.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from moebius.models.family import Family, _declared, model_types

MODELS = Path(__file__).parent.parent.parent / "src" / "moebius" / "models"
ROPE = MODELS / "rope_keys.json"
TABLES = sorted(
    kind
    for kind in model_types()
    if isinstance(declared := _declared(kind)[0], Family) and declared.keys is None
)
"""Types with a table: those that transformers knows, but for what holds a language model."""

# What a decoder meets beside its own two files, from reading the configuration to the next token's
# logits.
SHARED = {
    "configuration_utils": ["PreTrainedConfig.__post_init__", "PreTrainedConfig.get_text_config"],
    "modeling_rope_utils": [
        "RotaryEmbeddingConfigMixin.convert_rope_params_to_dict",
        "RotaryEmbeddingConfigMixin.standardize_rope_params",
        "_compute_linear_scaling_rope_parameters",
        "_compute_llama3_parameters",
        "_compute_yarn_parameters",
    ],
    "modeling_utils": [
        "PreTrainedModel.__init__",
        "PreTrainedModel.get_expanded_tied_weights_keys",
    ],
    "masking_utils": [
        "create_causal_mask",
        "create_sliding_window_causal_mask",
        "create_masks_for_generate",
    ],
    "cache_utils": ["get_layer_types_and_kwargs", "DynamicCache.__init__"],
    "integrations.moe": ["use_experts_implementation"],
    "quantizers.auto": ["get_hf_quantizer"],
    "utils.generic": ["can_return_tuple"],
}
ROPE_TYPES = {
    "linear": "_compute_linear_scaling_rope_parameters",
    "llama3": "_compute_llama3_parameters",
    "yarn": "_compute_yarn_parameters",
}
_CONFIGS = {
    "config",
    "self.config",
    "model.config",
    "layer_config",
    "effective_config",
    "decoder_config",
}


def table(kind: str) -> Path:
    """The file of a model_type."""
    return MODELS / "families" / f"{kind}.json"


def derive(kind: str) -> dict[str, Any]:
    """A model_type's table, from the transformers that is installed."""
    return {"transformers": transformers.__version__, **_model_type(kind, _shared())}


def as_json(found: dict[str, Any]) -> str:
    # Infinity as transformers writes it.
    written = PreTrainedConfig._encode_special_floats(found)
    return json.dumps(written, indent=1, sort_keys=True, allow_nan=False) + "\n"


@functools.cache
def _tree(module: types.ModuleType | type) -> ast.Module:
    return ast.parse(inspect.getsource(module))


def _model_type(kind: str, shared: dict[str, Any]) -> dict[str, Any]:
    config = type(AutoConfig.for_model(kind))
    modeling = importlib.import_module(config.__module__.replace("configuration_", "modeling_"))
    own = dataclasses.fields(config)
    defaults = {"rope_theta": config.default_theta} | {field.name: field.default for field in own}
    aliases = {
        a if b in defaults else b: b if b in defaults else a
        for a, b in config.attribute_map.items()
    }
    looked_up = dict(shared)
    for part in _run_by(config, _tree(modeling)):
        _merge(looked_up, _reads(part, _CONFIGS))
    _merge(looked_up, _reads(_tree(config), {"self"}))
    names = {aliases.get(name, name): meaning for name, meaning in looked_up.items()}
    read = {
        name: defaults.get(name, meaning)
        for name, meaning in names.items()
        if _is_key(name, defaults)
    }
    never_null = [
        field.name
        for field in own
        if field.name in read and not any(word in str(field.type) for word in ("None", "Optional"))
    ]
    return {"read": read, "never_null": sorted(never_null), "aliases": aliases}


def _run_by(config: type, module: ast.Module) -> list[ast.AST]:
    """What a model of this configuration runs of its module: all of it, or of one that has models
    of images beside those of text what the latter's class names, and what that names."""
    if not config.base_config_key:
        return [module]
    kinds = (ast.ClassDef, ast.FunctionDef)
    defined = {node.name: node for node in module.body if isinstance(node, kinds)}
    wanted = [AutoModelForCausalLM._model_mapping[config].__name__]
    found: dict[str, ast.AST] = {}
    while wanted:
        name = wanted.pop()
        if name in defined and name not in found:
            found[name] = defined[name]
            names = (n.id for n in ast.walk(defined[name]) if isinstance(n, ast.Name))
            wanted += names
    return list(found.values())


@functools.cache
def _shared() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module, names in SHARED.items():
        loaded = importlib.import_module(f"transformers.{module}")
        for name in names:
            node = _named(_tree(loaded), name.split("."))
            _merge(
                found,
                _reads(node, {"self", *_CONFIGS} if "Config" in name.split(".")[0] else _CONFIGS),
            )
    return found


def _merge(found: dict[str, Any], more: Iterator[tuple[str, Any]]) -> None:
    """A lookup that says what absent means counts for more than one that does not."""
    for name, meaning in more:
        if meaning is not None or name not in found:
            found[name] = meaning


def rope_types() -> dict[str, list[str]]:
    module = importlib.import_module("transformers.modeling_rope_utils")
    tree = _tree(module)
    tables = {"rope_parameters_dict", "config.rope_parameters"}
    found = {}
    for kind, function in ROPE_TYPES.items():
        node = _named(tree, [function])
        found[kind] = sorted({key for key, _ in _entries(node, tables)} | {"rope_theta"})
    return {"default": ["rope_theta"], **found}


def _reads(node: ast.AST, receivers: set[str]) -> Iterator[tuple[str, Any]]:
    """Each name that is looked up in a configuration, and what stands for it where it is absent, if
    that is said."""
    if "self" in receivers:
        yield from _entries(node, {"kwargs"})
    for each in ast.walk(node):
        if (
            isinstance(each, ast.Attribute)
            and isinstance(each.ctx, ast.Load)
            and ast.unparse(each.value) in receivers
        ):
            yield each.attr, None
        elif isinstance(each, ast.Call) and ast.unparse(each.func) in ("getattr", "hasattr"):
            if ast.unparse(each.args[0]) not in receivers:
                continue
            name, default = each.args[1], each.args[-1]
            if isinstance(name, ast.Constant):
                given = len(each.args) > 2 and isinstance(default, ast.Constant)
                yield (
                    name.value,
                    default.value if given and isinstance(default, ast.Constant) else None,
                )
            else:
                yield from ((listed, None) for listed in _listed(node))


def _listed(node: ast.AST) -> Iterator[str]:
    """Names in literal tuples and lists: what a function may look up that takes a name from a
    variable."""
    for each in ast.walk(node):
        if isinstance(each, (ast.Tuple, ast.List)):
            yield from (
                item.value
                for item in each.elts
                if isinstance(item, ast.Constant) and isinstance(item.value, str)
            )


def _entries(node: ast.AST, tables: set[str]) -> Iterator[tuple[str, Any]]:
    """Each constant key that is taken from a dictionary of such a name."""
    for each in ast.walk(node):
        table = key = None
        if isinstance(each, ast.Subscript):
            table, key = each.value, each.slice
        elif (
            isinstance(each, ast.Call)
            and isinstance(each.func, ast.Attribute)
            and each.func.attr in ("get", "pop")
        ):
            table, key = each.func.value, each.args[0]
        if (
            isinstance(key, ast.Constant)
            and isinstance(key.value, str)
            and ast.unparse(table) in tables
        ):
            yield key.value, None


def _named(tree: ast.AST, names: list[str]) -> ast.AST:
    """The definition of a function, or of a class's method."""
    for name in names:
        kinds = (ast.ClassDef, ast.FunctionDef)
        tree = next(
            node for node in ast.walk(tree) if isinstance(node, kinds) and node.name == name
        )
    return tree


def _is_key(name: str, fields: dict[str, Any]) -> bool:
    """No method, no constant of the class, and nothing that only transformers itself sets."""
    known = getattr(PreTrainedConfig, name, None)
    return name in fields or (
        not name.startswith("_") and (known is None or isinstance(known, property))
    )


if __name__ == "__main__":
    for model_type in sys.argv[1:] or TABLES:
        table(model_type).write_text(as_json(derive(model_type)), encoding="utf-8")
    ROPE.write_text(as_json(rope_types()), encoding="utf-8")
    print(f"the tables are of transformers {transformers.__version__}")
