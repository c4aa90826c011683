"""Sharded checkpoints: save, load under any layout, read by name, without running what they hold.

`read`, `write` and what they need (`directory`, `safe`, `state`, `tokenizer`) import torch only;
`save` and `load` need megatron-core and initialised process groups.
"""
