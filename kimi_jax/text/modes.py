"""Holds the values that Moonshot recommends for drawing tokens in K2.5's modes, with thinking and without (Instant)."""

TEMPERATURE = {True: 1.0, False: 0.6}  # with thinking, without
TOP_P = 0.95
