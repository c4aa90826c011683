"""Generate text with early-exit models: batch tokens of different depths and verify each result.

`verification` defines a generation one sequence at a time and checks finished ones. `engine` and
`pipeline_engine` produce the same generations in batches, on one or several ranks. This package
needs torch but never megatron-core.
"""
