"""Sharded checkpoints: save, load under any layout, read by name, without running what they hold.

`read` and what it needs (`directory`, `safe`, `tokenizer`) import torch only; `save` and `load`
need megatron-core and initialised process groups.
"""
