"""Defines the axis letters of this package and the array types made of them.

    b  batch             t  tokens of this call      s  cached or attended tokens
    d  hidden_size       w  words of the vocabulary  h  attention heads
    i  width of what attention takes: d, twice that in a draft head
    n  qk_nope_head_dim  r  qk_rope_head_dim         k  q/k head width     v  value head width
    c  latent width: kv_lora_rank, or with the rope part kv_lora_rank + qk_rope_head_dim
    e  routed experts    j  experts per token        f  feed-forward width
    p  patches           m  media tokens (patches after the merge)

Tests check shapes at run time (jaxtyping with beartype); elsewhere they are documentation.
"""

import numpy as np
from jaxtyping import Array as Array
from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Float32 as Float32
from jaxtyping import Int32 as Int32
from jaxtyping import UInt32 as UInt32

# An array on the host or on devices.
AnyArray = np.ndarray | Array

Tokens = Int32[Array, "b t"]
Positions = Int32[Array, "b t"]
PageTable = Int32[Array, "sequences row_pages"]
Lengths = Int32[Array, "b"]
Valid = Bool[Array, "b t"]
Hidden = Float[Array, "b t d"]
Inputs = Float[Array, "b t i"]
# The residual stream on one device; its mixers may see other rows and tokens of it (`sharding.StreamLayout`).
Stream = Float[Array, "rows tokens d"]
FlatHidden = Float[Array, "t d"]
Queries = Float[Array, "b t h k"]
Values = Float[Array, "b t h v"]
LogSumExp = Float32[Array, "b t h"]
Latents = Float[Array, "b s c"]
Logits = Float32[Array, "b t w"]
LastLogits = Float32[Array, "b w"]
Patches = Float[Array, "p 3 kh kw"]
MediaTokens = Float[Array, "m d"]
