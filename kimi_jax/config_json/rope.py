"""Reads the rotation of positions: `rope_theta` with `rope_scaling`, or transformers 5's `rope_parameters`, which
contains both."""

from kimi_jax.config import YarnConfig
from kimi_jax.config_json.fields import Fields
from kimi_jax.config_json.keys import MAX_POSITIONS, ROPE_ALIASES

DEFAULT_THETA = 10000.0


def rope(fields: Fields) -> tuple[float, YarnConfig | None]:
    """Returns the base of the frequencies, and YaRN or None. Raises `ConfigError` where a key of either spelling is
    not known, asks for another rotation, or contradicts another key."""
    length = fields.integer("original_max_position_embeddings", 0, least=1, most=MAX_POSITIONS)
    thetas, scalings = [_theta(fields)], []
    for name in ("rope_scaling", "rope_parameters"):
        if (inner := fields.object(name, ROPE_ALIASES)) is not None:
            thetas.append(_theta(inner))
            scalings.append(_scaling(inner, length))
    fields.check(
        len(scalings) < 2 or scalings[0] == scalings[1], "rope_scaling and rope_parameters contradict each other"
    )
    given = sorted({theta for theta in thetas if theta is not None})
    fields.check(len(given) < 2, f"rope_theta is given as {' and as '.join(map(str, given))}")
    return given[0] if given else DEFAULT_THETA, scalings[0] if scalings else None


def _theta(fields: Fields) -> float | None:
    return fields.number("rope_theta", least=1.0) if fields.has("rope_theta") else None


def _scaling(fields: Fields, length: int) -> YarnConfig | None:
    fields.only("partial_rotary_factor", 1.0)
    kind = fields.raw("rope_type")
    fields.check(
        kind in ("yarn", "default") or (kind is None and not fields.has("factor")),
        f"type {kind!r} is not supported; only 'yarn', and 'default' for none",
    )
    yarn = _yarn(fields, length) if kind == "yarn" else None
    fields.nothing_else()
    return yarn


def _yarn(fields: Fields, length: int) -> YarnConfig:
    factor = fields.number("factor", least=1.0, above=False)
    own = fields.integer("original_max_position_embeddings", length or None, least=1, most=MAX_POSITIONS)
    fields.check(
        length in (0, own), f"original_max_position_embeddings {own} differs from {length}, which stands outside"
    )
    yarn = YarnConfig(
        factor=factor,
        original_max_position_embeddings=own,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        mscale=fields.number("mscale", 1.0, above=False),
        mscale_all_dim=fields.number("mscale_all_dim", 0.0, above=False),
        attention_factor=fields.number("attention_factor") if fields.has("attention_factor") else None,
        truncate=fields.flag("truncate", True),
    )
    fields.check(
        yarn.beta_fast >= yarn.beta_slow, f"beta_fast {yarn.beta_fast} is less than beta_slow {yarn.beta_slow}"
    )
    # transformers uses m(factor, 1) unless both are given and not 0; DeepSeek's code uses the two values as given.
    alike = (yarn.mscale > 0 and yarn.mscale_all_dim > 0 and fields.has("mscale")) or (
        yarn.mscale == 1.0 and yarn.mscale_all_dim == 0.0
    )
    fields.check(
        alike or factor == 1.0 or yarn.attention_factor is not None,
        f"mscale {fields.raw('mscale')} with mscale_all_dim {fields.raw('mscale_all_dim')} means one thing to "
        "transformers and another to DeepSeek's code; expected both above 0, or attention_factor",
    )
    return yarn
