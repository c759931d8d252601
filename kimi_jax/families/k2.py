"""Kimi K2, K2-0905 and K2-Thinking: DeepSeek-V3's config.json and tensor names, which this package has for its own."""

from kimi_jax.families.family import Family

K2 = Family(
    name="k2",
    title="Kimi K2",
    architectures=("DeepseekV3ForCausalLM",),
    model_types=("kimi_k2", "deepseek_v3"),
    template="k2",
)
