"""Limits on the cost of a picture or an animation: a few kilobytes can ask for gigabytes.

Sizes are read from headers and refused before pixels are decoded.
"""

MAX_BYTES = 2**26  # of one compressed picture or animation
MAX_PIXELS = 2**28 // 3  # of a still: Pillow warns beyond it; the model sees 3.2 million of them
MAX_SIDE = 65_535  # the longest side that a JPEG or GIF can have
MAX_FRAME_PIXELS = 2**25  # of an animation's frame, of which decoders hold four: 8K video has 33.2 million
MAX_FRAMES = 10_000  # of an animation: over five minutes at 30 frames per second
MAX_VIDEO_PIXELS = 2**32  # of all frames of an animation, which are decoded in order: 2,000 frames of full HD
MAX_PATCHES = 2**20  # of a conversation: 2.5 GB as float32; images of that many fill a context of 262,144 tokens
