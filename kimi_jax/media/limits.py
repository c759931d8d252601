"""Limits the cost of a picture, an animation or a film, since a file of a few kilobytes can ask for gigabytes.

Sizes are read from headers, and too large ones refused before pixels are decoded.
"""

MAX_BYTES = 2**26  # of one compressed picture or animation
MAX_PIXELS = 2**28 // 3  # of a still picture: Pillow warns of more; the model gets at most 3.2 million of them
MAX_SIDE = 65_535  # the longest side that a JPEG or GIF can have
MAX_FRAME_PIXELS = 2**25  # of an animation's frame: 8K video has 33.2 million. Decoders keep up to four frames
MAX_FRAMES = 10_000  # of an animation: 5.5 minutes at 30 frames per second
MAX_VIDEO_PIXELS = 2**32  # of all frames of an animation, since all are decoded: 2,000 frames of full HD
MAX_FILM_FRAMES = 108_000  # of a film: an hour at 30 frames per second
MAX_FILM_PIXELS = 2**35  # of all frames of a film: nine minutes of full HD at 30 per second, decoded in about one
MAX_PATCHES = 2**20  # of a conversation: four to a token fill K2.5's context of 262,144 tokens; 2.5 GB as float32
