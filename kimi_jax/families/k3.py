"""Kimi K3: a vision tower, a projector, and a language model of Kimi Linear's family.

config.json holds the language model in `text_config` and the tower in `vision_config`; the language model's tensors
are published under `language_model.`, in Kimi Linear's names.
"""

from kimi_jax.families.family import ConfigSpelling, Family, TensorNames

K3 = Family(
    name="k3",
    title="Kimi K3",
    architectures=("KimiK3ForConditionalGeneration",),
    model_types=("kimi_k3",),
    template="k3",
    stop_ids=(163585,),  # [EOS], beside <|end_of_msg|>, which the files name
    config=ConfigSpelling(text_config="text_config", vision_config="vision_config"),
    tensors=TensorNames(prefix="language_model."),
)
