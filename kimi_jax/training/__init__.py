"""Training of Kimi models: quantisation-aware, by MuonClip, and by reinforcement learning."""

from kimi_jax.training.leaves import leaf_name as leaf_name
from kimi_jax.training.leaves import split_trained as split_trained
from kimi_jax.training.leaves import treatment as treatment
from kimi_jax.training.muon import muon as muon
from kimi_jax.training.optimizer import optimizer as optimizer
from kimi_jax.training.optimizer import warmup_stable_decay as warmup_stable_decay
from kimi_jax.training.parl import critical_steps as critical_steps
from kimi_jax.training.parl import finish_reward as finish_reward
from kimi_jax.training.parl import parallel_reward as parallel_reward
from kimi_jax.training.parl import parl_reward as parl_reward
from kimi_jax.training.parl import parl_reward_report as parl_reward_report
from kimi_jax.training.qk_clip import qk_clip as qk_clip
from kimi_jax.training.quantization import as_published as as_published
from kimi_jax.training.quantization import fake_quantize_experts as fake_quantize_experts
from kimi_jax.training.rl_losses import group_advantages as group_advantages
from kimi_jax.training.rl_losses import k2_rl_loss as k2_rl_loss
from kimi_jax.training.rl_losses import kimi_rl_loss as kimi_rl_loss
from kimi_jax.training.router_bias import load_imbalance as load_imbalance
from kimi_jax.training.router_bias import update_router_bias as update_router_bias
from kimi_jax.training.toggle import is_budgeted as is_budgeted
from kimi_jax.training.toggle import length_budget as length_budget
from kimi_jax.training.toggle import toggle_rewards as toggle_rewards
from pallas_kernels.formats import fake_quantize_int4 as fake_quantize_int4
