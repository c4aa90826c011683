"""From a checkpoint to text: the plain reference generator, exit policies, sampling, certificates.

`reference` is the model as the definitions have it, `generator` decodes one sequence at a time with
it, and `certificate` proves a finished sequence. The room needs torch, never megatron-core.
"""
