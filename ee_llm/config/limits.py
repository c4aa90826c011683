"""Upper bounds of options: well above practical values, and below where computations break."""

MAX_LAYERS = 10_000
"""Checks and plans iterate over the layers."""

MAX_WIDTH = 1 << 20
"""Maximum width of hidden states, heads and MLPs.

The product of two widths is the number of elements of a tensor. It must fit into 64 bits, of which
allocators use fewer.
"""

MAX_VOCAB_SIZE = 10_000_000
"""Ten times the largest vocabulary in use; token files store ids in 32 bits."""

MAX_SEQ_LENGTH = 1 << 27
"""In tokens. Tables of rotary angles and learned positions have one row per position."""

MAX_RANKS = 1 << 16
"""Maximum number of ranks along an axis, and of processes on a machine, which are kept in lists."""

MAX_BATCH_SIZE = 1 << 16
"""Sequences per step. A pipeline plan holds the actions of every microbatch in memory."""

MAX_STEPS = 1_000_000_000
"""Multiplied by the largest batch and sequence, the number of tokens still fits into 64 bits."""

MAX_SEED = (1 << 32) - 1
"""NumPy seeds have 32 bits. Ranks add small offsets."""

MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.1, 2_000_000.0
"""In seconds. gloo counts milliseconds in 32 bits and treats 0 as no time-out."""

MAX_RATE = 1e4
"""Maximum learning rate and weight decay: their product with a gradient must fit into float32."""

MAX_FACTOR = 1e6
"""Maximum of weights and ratios around 1; the minimum of ratios is its reciprocal."""

MAX_FLOAT = 1e30
"""Maximum of large values that must fit into float32, whose largest number is 3e38."""
