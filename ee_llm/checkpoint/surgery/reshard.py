"""Divides a checkpoint into new blocks, so that each rank of another layout reads only its own.

Any layout can load any checkpoint, because a rank extracts its part from the blocks that contain
it. But if a block spans the parts of many ranks, as after conversion or a run on few ranks, each of
these ranks reads all of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from ee_llm.architecture.partition import exit_stage, stage_layers
from ee_llm.architecture.tensor_parallel import tensor_split
from ee_llm.checkpoint.read import TensorReader
from ee_llm.checkpoint.surgery.rewrite import Rewrite, model_copy_of, parameter_of, with_options
from ee_llm.checkpoint.write import Block, rows
from ee_llm.config import Config
from ee_llm.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Layout:
    """A parallel layout; see the options of `parallel`."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    layer_split: tuple[int, ...] = ()


def resharded(reader: TensorReader, layout: Layout) -> Rewrite:
    """Return the checkpoint with the blocks of the ranks of `layout`, in one file per rank.

    Its configuration states the layout. A run resumes from it as from the original: the parameters,
    the optimizer's state, the position in the data and the random generators of the ranks are the
    same (the generators apply only to the layout that saved them). Of a tuning run only the model
    is kept, because it does not build the layers behind its last exit. Raises CheckpointError if
    the model cannot have this layout.
    """
    whole = model_copy_of(reader)
    parallel = vars(layout) | {"sequence": whole.config.parallel.sequence and layout.tensor > 1}
    if layout.pipeline == 1:
        parallel |= {"fill_warmup": 0, "fill_cooldown": 0}
    try:
        config = with_options(whole.config, parallel=parallel)
    except ConfigError as error:
        raise CheckpointError(f"invalid layout: {error}") from None

    def blocks(name: str, tensor: Tensor) -> Iterator[Block]:
        parameter = parameter_of(name)
        first = layout.tensor * stage_of(parameter, config)
        for rank, offsets, part in parts_of(parameter, tensor, config):
            for row, block in rows(part):
                start = (offsets[0] + row, *offsets[1:]) if offsets else ()
                yield Block(start, block, f"__{first + rank}_0.distcp")

    stages = config.parallel.num_stages
    facts = {"blocks": {"tensor": layout.tensor, "stages": stages}}
    return replace(whole, config=config, blocks=blocks, facts=facts)


def stage_of(parameter: str, config: Config) -> int:
    """Return the first pipeline stage (from 0) that has a parameter."""
    section, _, rest = parameter.partition(".")
    if section == "layers":
        number = int(rest.partition(".")[0])
        stages = range(config.parallel.num_stages)
        return next(stage for stage in stages if number in stage_layers(config, stage))
    if section == "exits":
        return exit_stage(config, int(rest.partition(".")[0]))
    return 0 if section == "embedding" else config.parallel.num_stages - 1


def parts_of(
    parameter: str, tensor: Tensor, config: Config
) -> Iterator[tuple[int, tuple[int, ...], Tensor]]:
    """Yield the tensor rank, the offsets and the values of each part of a tensor.

    Rank 0 stores the tensors that every rank has.
    """
    size, split = config.parallel.tensor, tensor_split(parameter, config.model)
    offsets = [0] * tensor.dim()
    if split is None or size == 1:
        yield 0, tuple(offsets), tensor
        return
    for block in split.parts(tensor, size):
        for rank, part in enumerate(block):
            yield rank, tuple(offsets), part
            offsets[split.dim] += part.shape[split.dim]
