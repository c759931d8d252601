"""Kimi K2.5, K2.6 and K2.7-Code: a vision tower, a projector, and a language model of another family.

config.json holds the language model in `text_config` and the tower in `vision_config`; the language model's tensors
are published under `language_model.`.
"""

import re

from kimi_jax.families.family import ConfigSpelling, Family, SavedSpelling, TensorNames

# transformers 5's keys -> the releases'.
_VISION_KEYS = {
    "hidden_size": "vt_hidden_size",
    "num_hidden_layers": "vt_num_hidden_layers",
    "num_attention_heads": "vt_num_attention_heads",
    "intermediate_size": "vt_intermediate_size",
    "pos_emb_height": "init_pos_emb_height",
    "pos_emb_width": "init_pos_emb_width",
    "pos_emb_time": "init_pos_emb_time",
}
_PROJECTOR_KEYS = {
    "projection_hidden_size": "mm_hidden_size",
    "projection_hidden_act": "projector_hidden_act",
    "projection_layer_norm_eps": "projector_ln_eps",
}
_SAVED = SavedSpelling(
    re.compile(r"language_model\.model\.blocks\.\d"),
    (
        (re.compile(r"^language_model\.model\.blocks\."), "language_model.model.layers."),
        (re.compile(r"^model\.mm_projector\."), "mm_projector."),
        (re.compile(r"^vision_tower\.encoder\.patch_embed\."), "vision_tower.patch_embed."),
    ),
)

K25 = Family(
    name="k2.5",
    title="Kimi-K2.5",
    architectures=("KimiK25ForConditionalGeneration",),
    model_types=("kimi_k25",),
    template="k2.5",
    config=ConfigSpelling(
        text_config="text_config",
        vision_config="vision_config",
        top_keys={"image_token_id": "media_placeholder_token_id"},
        vision_keys=_VISION_KEYS,
        projector_keys=_PROJECTOR_KEYS,
    ),
    tensors=TensorNames(
        prefix="language_model.",
        saved=(_SAVED,),
        # save_original_format=False puts rows of the vision tower's queries and keys in another order.
        unreadable=re.compile(r"model\.(language_model|vision_tower)\."),
    ),
)
