"""Sharded checkpoints: save them, load them under any parallel layout and read tensors by name.

No code in a checkpoint is ever executed. `read`, `write` and the modules that they use
(`directory`, `format`, `state`, `tokenizer`) need only torch; `sharded` and `warm_start` need
megatron-core and initialised process groups.
"""
