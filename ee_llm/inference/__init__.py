"""From a checkpoint to text: tokens of different depths in one batch, and the proof of each.

`reference` and `generator` say what a generation is, one sequence at a time. `engine` and
`pipeline_engine` make the same in batches, over ranks too; `certificate` proves a finished one.
The room needs torch, never megatron-core.
"""
