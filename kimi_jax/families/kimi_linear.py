"""Kimi Linear: Kimi Delta Attention in most layers, MLA without rotation in the others.

Its config.json has spellings of its own for DeepSeek-V3's fields, and its experts are w1, w3 and w2 of a
`block_sparse_moe`. The language model of Kimi K3 is published in this spelling too.
"""

import re

from kimi_jax.families.family import ConfigSpelling, Family, SavedSpelling, TensorNames

_TEXT_KEYS = {
    "num_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "num_expert_group": "n_group",
    "moe_router_activation_func": "scoring_func",
    "moe_renormalize": "norm_topk_prob",
    "model_max_length": "max_position_embeddings",
}
# Dense layers stay `mlp`, layers with experts are `block_sparse_moe`.
_MIXTURE = (re.compile(r"\.mlp\.(?=gate\.|experts\.|shared_experts\.|routed_expert_)"), ".block_sparse_moe.")
_RENAMES = (
    _MIXTURE,
    (re.compile(r"(\.experts\.\{\}\.)gate_proj\."), r"\1w1."),
    (re.compile(r"(\.experts\.\{\}\.)up_proj\."), r"\1w3."),
    (re.compile(r"(\.experts\.\{\}\.)down_proj\."), r"\1w2."),
)
_SAVED = (
    # transformers 5.23 calls the dense layers block_sparse_moe too.
    SavedSpelling(
        re.compile(r"\.block_sparse_moe\.gate_proj\."),
        ((re.compile(r"\.block_sparse_moe\.(?=(gate|up|down)_proj\.)"), ".mlp."),),
    ),
    # save_original_format=False
    SavedSpelling(
        re.compile(r"\.self_attn\.forget_gate\."),
        ((re.compile(r"\.forget_gate\."), "."), _MIXTURE),
    ),
)

KIMI_LINEAR = Family(
    name="kimi-linear",
    title="Kimi Linear",
    architectures=("KimiLinearForCausalLM",),
    model_types=("kimi_linear",),
    template="k2",
    # transformers' class has no key for the rotation that is not there.
    config=ConfigSpelling(text_keys=_TEXT_KEYS, no_rotation=True, needs_kda=True),
    tensors=TensorNames(renames=_RENAMES, saved=_SAVED),
)
