"""Turns images and video into the patches and grids that MoonViT reads, by the rules of Kimi K2.5's own processor.

`sources` reads the bytes, `opening` decodes them, `appearance` turns and composites pictures as a viewer does,
`patches` scales and cuts them, `video` samples frames, `conversation` does all this for several at once. No module here
imports JAX.
"""

from kimi_jax.media.config import Config as Config
from kimi_jax.media.config import MediaConfig as MediaConfig
from kimi_jax.media.limits import MAX_PATCHES as MAX_PATCHES
from kimi_jax.media.opening import open_image as open_image
from kimi_jax.media.patches import Grid as Grid
from kimi_jax.media.patches import Resize as Resize
from kimi_jax.media.patches import expand as expand
from kimi_jax.media.patches import grid as grid
from kimi_jax.media.patches import image_patches as image_patches
from kimi_jax.media.patches import navit_resize as navit_resize
from kimi_jax.media.patches import normalize as normalize
from kimi_jax.media.patches import scale_image as scale_image
from kimi_jax.media.sources import from_message as from_message
from kimi_jax.media.video import SampledVideo as SampledVideo
from kimi_jax.media.video import VideoChunk as VideoChunk
from kimi_jax.media.video import open_video as open_video
from kimi_jax.media.video import sample_video as sample_video
from kimi_jax.media.video import video_patches as video_patches
