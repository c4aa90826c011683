"""Upper bounds of numbers, each well above what anybody uses and below where something breaks."""

MAX_LAYERS = 10_000
"""Checks and plans go through the layers one by one."""

MAX_WIDTH = 1 << 20
"""Of hidden states, heads and MLPs: the product of two is a tensor's number of elements, in 64 bits
of which allocators use fewer."""

MAX_VOCAB_SIZE = 10_000_000
"""Ten times the largest in use; token files store ids in 32 bits."""

MAX_SEQ_LENGTH = 1 << 27
"""In tokens; tables of rotary angles and learned positions have a row for each."""

MAX_RANKS = 1 << 16
"""Ranks along one axis, and processes of a machine: lists are made of them."""

MAX_BATCH_SIZE = 1 << 16
"""Sequences in a step. The plan of a pipeline has actions for each microbatch, in memory."""

MAX_STEPS = 1_000_000_000
"""Times the largest batch and sequence, this still counts tokens in 64 bits."""

MAX_SEED = (1 << 32) - 1
"""NumPy's seeds have 32 bits, and ranks add small numbers of their own."""

MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.1, 2_000_000.0
"""In seconds: gloo counts milliseconds in 32 bits, and takes 0 for no time-out."""

MAX_RATE = 1e4
"""Of learning rates and the like: their product with a gradient must be a float32."""

MAX_FACTOR = 1e6
"""Of weights and ratios around 1; the least is one over it."""

MAX_FLOAT = 1e30
"""Of what may be large and has to be a float32, of which the largest is 3e38."""
