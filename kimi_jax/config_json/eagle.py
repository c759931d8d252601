"""Reads the config.json of an Eagle3 draft head, and fits the head to its target.

A head's file looks like that of a DeepSeek-V3 or a Llama of one layer; its `architectures` says that it is a head, and
in which form its layer is published. Keys are read, refused and warned of as those of models are.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from kimi_jax import json_reader
from kimi_jax.config import EagleConfig, KimiConfig, TextConfig
from kimi_jax.config_json.fields import ConfigError, Fields, shown
from kimi_jax.config_json.keys import (
    HARMLESS_TEXT,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    NEUTRAL_SAMPLING,
    ONLY_TEXT,
    TEXT_ALIASES,
)
from kimi_jax.config_json.reader import Folder, from_folder, is_eagle
from kimi_jax.config_json.rope import rope
from kimi_jax.config_json.text import DTYPES, check_attention
from kimi_jax.printable import printable

# The names that trainers and servers give the two forms.
_FORMS: Mapping[str, Literal["mla", "llama"]] = {
    "Eagle3DeepseekV2ForCausalLM": "mla",
    "Eagle3DeepseekV3ForCausalLM": "mla",
    "DeepSeekForCausalLMEagle3": "mla",
    "LlamaForCausalLMEagle3": "llama",
    "Eagle3LlamaForCausalLM": "llama",
}
# Keys that ask for another head, with the values that do not.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "num_hidden_layers": (1,),
    "num_nextn_predict_layers": (0,),
    "bias": (False,),
    "norm_bias": (False,),
    "norm_before_fc": (False,),
}
_ONLY_EAGLE: Mapping[str, tuple[Any, ...]] = {
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "next_layer_regular": (True,),
    "parallel_draft_step": (1,),
    "parallel_draft_heads_num_layers": (),
}
_AUX_LAYERS = "eagle_aux_hidden_state_layer_ids"
_MOST_AUX = 16  # layers of a target; heads take 3


def read_config(folder: str | Folder) -> KimiConfig | EagleConfig:
    """Reads the configuration of the checkpoint in `folder`, a model or a draft head.

    Raises `ConfigError` and warns as `from_folder` does.
    """
    folder = Path(folder) if isinstance(folder, str) else folder
    path = folder / "config.json"
    if path.exists() and is_eagle(values := json_reader.read_object(path, error=ConfigError)):
        return eagle_from_dict(values, where=str(path))
    return from_folder(folder)


def eagle_from_dict(config: Mapping[str, Any], *, where: str = "config.json") -> EagleConfig:
    """Returns the configuration of a head, of the parsed contents of its config.json, which `where` names in errors.

    Raises `ConfigError` naming the field for a form that is not known, and for anything missing, impossible or not
    supported; warns of unknown keys.
    """
    fields = Fields(config, printable(where), {**TEXT_ALIASES, "use_aux_norm": "fc_norm"})
    form = _form(fields)
    for name, values in {**ONLY_TEXT, **_ONLY}.items():
        fields.only(name, *values)
    fields.neutral(NEUTRAL_SAMPLING)
    layer, kv_heads = _layer(fields, form)
    draft = fields.integer("draft_vocab_size", layer.vocab_size, least=1, most=MAX_VOCAB)
    fields.check(draft <= layer.vocab_size, f"draft_vocab_size {draft} is more than vocab_size {layer.vocab_size}")
    found = EagleConfig(
        model_type=str(fields.raw("model_type")),
        form=form,
        layer=layer,
        num_key_value_heads=kv_heads,
        draft_vocab_size=draft,
        target_hidden_size=fields.integer("target_hidden_size", layer.hidden_size, least=1, most=MAX_WIDTH),
        aux_layers=_aux_layers(fields),
        fc_norm=fields.flag("fc_norm", False),
        norm_output=fields.flag("norm_output", False),
        norm_before_residual=fields.flag("norm_before_residual", False),
        vocab_map=draft < layer.vocab_size,
    )
    if unread := fields.unread(HARMLESS_TEXT | {"max_window_layers"}):
        names = ", ".join(printable(name) for name in unread[:20])
        warnings.warn(f"{fields.where}: has keys that are not known, or not acted on: {names}", stacklevel=1)
    return found


def fit_target(config: EagleConfig, target: KimiConfig, where: str = "draft head") -> EagleConfig:
    """Returns the configuration of a head with the `aux_layers` that it takes of `target`.

    Raises `ConfigError`, which `where` opens, where the head was made for another model: other widths, another
    vocabulary, or layers that the target does not have.
    """
    text, layer = target.text, config.layer
    wrong = [
        ("target_hidden_size", config.target_hidden_size, text.hidden_size),
        ("vocab_size", layer.vocab_size, text.vocab_size),
    ]
    if not config.own_embedding:
        wrong.append(("hidden_size, whose embeddings are the target's,", layer.hidden_size, text.hidden_size))
    for name, found, expected in wrong:
        if found != expected:
            raise ConfigError(f"{where}: {name} is {found}, but that of its target is {expected}")
    aux = config.aux_layers
    if aux is None:  # the rule of the trainers and servers where no file says more
        aux = (1, text.num_hidden_layers // 2 - 1, text.num_hidden_layers - 4)
    if bad := [number for number in aux if not 0 <= number < text.num_hidden_layers]:
        raise ConfigError(
            f"{where}: it takes the output of layer {bad[0]}, counted from 0, but its target has "
            f"{text.num_hidden_layers} layers"
        )
    return dataclasses.replace(config, aux_layers=aux)


def _form(fields: Fields) -> Literal["mla", "llama"]:
    named = fields.raw("architectures")
    form = next((_FORMS[name] for name in named if isinstance(name, str) and name in _FORMS), None)
    if form is None:
        raise ConfigError(
            f"{fields.named('architectures')} {shown(named)} is no form of an Eagle3 head that is known; expected one "
            f"of {', '.join(_FORMS)}"
        )
    return form


def _layer(fields: Fields, form: Literal["mla", "llama"]) -> tuple[TextConfig, int]:
    """Returns the widths of the head's layer, and the number of its heads of keys and values."""
    vocab_size = fields.integer("vocab_size", least=1, most=MAX_VOCAB)
    hidden = fields.integer("hidden_size", least=1, most=MAX_WIDTH)
    heads = fields.integer("num_attention_heads", least=1, most=MAX_HEADS)
    q_rank: int | None = None
    if form == "mla":
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank")
        kv_rank, nope, turned, v_dim, q_rank = (fields.integer(name, least=1, most=MAX_WIDTH) for name in names)
        kv_heads = heads
    else:
        turned = v_dim = fields.integer("head_dim", hidden // heads, least=1, most=MAX_WIDTH)
        kv_rank = nope = 0
        kv_heads = fields.integer("num_key_value_heads", heads, least=1, most=MAX_HEADS)
        fields.check(turned % 2 == 0, f"head_dim {turned} is odd; RoPE turns pairs")
        fields.check(
            heads % kv_heads == 0,
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}",
        )
    theta, yarn = rope(fields)
    eps = fields.number("rms_norm_eps", most=1.0)
    pad = fields.token_id("pad_token_id", vocab_size)
    layer = TextConfig(
        model_type=str(fields.raw("model_type")),
        family="eagle3",
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=fields.integer("intermediate_size", least=1, most=MAX_WIDTH),
        kv_lora_rank=kv_rank,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=turned,
        v_head_dim=v_dim,
        max_position_embeddings=fields.integer("max_position_embeddings", least=1, most=MAX_POSITIONS),
        rms_norm_eps=eps,
        bos_token_id=fields.token_id("bos_token_id", vocab_size),
        pad_token_id=0 if pad is None else pad,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
        q_lora_rank=q_rank,
        mla_inner_norm_eps=eps,
        rope_theta=theta,
        rope_scaling=yarn,
        initializer_range=fields.number("initializer_range", 0.02),
        dtype=fields.word("dtype", DTYPES, "bfloat16"),
    )
    if form == "mla":
        check_attention(fields, layer)
    return layer, kv_heads


def _aux_layers(fields: Fields) -> tuple[int, ...] | None:
    """Returns the target's layers, counted from 0, whose outputs the head takes; None where the file has no list.

    A list in `eagle_config` that begins with 1 has such numbers, as the trainer writes them; another, and one beside
    `eagle_config`, counts the layers that are done, which is one more (vLLM's and SGLang's rule).
    """
    lists = []
    if (inner := fields.object("eagle_config")) is not None:
        for name, values in _ONLY_EAGLE.items():
            inner.only(name, *values)
        if inner.has(_AUX_LAYERS):
            ids = _numbers(inner)
            lists.append(ids if ids[0] == 1 else tuple(number - 1 for number in ids))
        inner.nothing_else()
    if fields.has(_AUX_LAYERS):
        lists.append(tuple(number - 1 for number in _numbers(fields)))
    fields.check(len(set(lists)) < 2, f"{_AUX_LAYERS} beside eagle_config contradicts that inside it")
    return lists[0] if lists else None


def _numbers(fields: Fields) -> tuple[int, ...]:
    ids = fields.integers(_AUX_LAYERS, least=1, most=MAX_LAYERS, longest=_MOST_AUX)
    fields.check(len(ids) > 0, f"{_AUX_LAYERS} is empty")
    return ids
