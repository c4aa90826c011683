"""A pipeline stage: consecutive layers, their exits, and shared weights.

Shapes: s sequence, b microbatch, h hidden, v vocabulary, t tensor-parallel ranks.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ee_llm import distributed
from ee_llm.architecture.parameter_names import output_weight_name
from ee_llm.architecture.partition import exit_stage, stage_layers
from ee_llm.config import Config
from ee_llm.errors import UserError
from ee_llm.model.deferred_gradients import WeightGradients
from ee_llm.model.dropout import hidden_region
from ee_llm.model.embedding import Embedding
from ee_llm.model.exits import Exit
from ee_llm.model.initialize import initialize
from ee_llm.model.layer_dropout import KeptRows, run_on_rows
from ee_llm.model.linear import ColumnLinear, RowLinear
from ee_llm.model.rotary import RotaryAngles
from ee_llm.model.specs import layer_spec, transformer_config, uses_transformer_engine

distributed.enable_megatron()
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default


class ModuleTable(torch.nn.ModuleDict):
    """Modules by layer number or boundary, which is part of their checkpoint keys."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        for name, module in self.items():
            state |= sharded_state_dict_default(
                module, f"{prefix}{name}.", sharded_offsets, metadata
            )
        return state


def stages_of_exits(config: Config) -> dict[int, int]:
    """Return the stage of every exit to build by boundary, in increasing order."""
    return {boundary: exit_stage(config, boundary) for boundary in config.built_exits}


def stages_with_weight(config: Config, weight_name: str) -> tuple[int, ...]:
    """Return the stages that have a copy of an embedding or output weight, the owner first."""
    # Exits that distill also compute the logits of the final exit.
    final = [config.model.num_layers] if config.distills else []
    stages = {
        stage
        for boundary, stage in stages_of_exits(config).items()
        if weight_name in {output_weight_name(config, b) for b in (boundary, *final)}
    }
    if weight_name == "embedding.word.weight":
        stages.add(0)
    return tuple(sorted(stages))


class Stage(MegatronModule):
    """The layers and exits of stage `index` of the pipeline.

    Parameter names do not depend on the layout: they contain the layer number or exit boundary.
    """

    def __init__(self, config: Config, index: int, dtype: torch.dtype) -> None:
        parts = transformer_config(config, dtype)
        super().__init__(config=parts)
        self.index = index
        self.is_first = index == 0
        self.is_last = index == config.parallel.num_stages - 1
        self.recompute = config.training.recompute == "full"
        self.shares_positions = not config.data.reset_positions
        self.is_frozen = config.is_tuning
        boundaries = [b for b, stage in stages_of_exits(config).items() if stage == index]

        self.embedding: Any = None
        self.output: Any = None
        if index in stages_with_weight(config, "embedding.word.weight"):
            self.embedding = Embedding(config.model, parts, with_positions=self.is_first)
        if index in stages_with_weight(config, "output.weight"):
            self.output = ColumnParallelLinear(
                parts.hidden_size,
                config.model.vocab_size,
                config=parts,
                init_method=parts.init_method,
                bias=False,
            )
        self.layers = ModuleTable(
            {
                str(number): build_module(layer_spec(parts), config=parts, layer_number=number)
                for number in stage_layers(config, index)
            }
        )
        self.exits = ModuleTable({str(b): Exit(config, parts, b) for b in boundaries})
        self.output_weights = {b: output_weight_name(config, b) for b in boundaries}
        self.final_output_weight = output_weight_name(config, config.model.num_layers)
        self.final_boundary = config.model.num_layers
        self.weight_gradients = WeightGradients()
        if config.parallel.schedule != "1f1b":
            self._defer_weight_gradients(config.parallel.schedule, parts)
        self.rotary = None
        if config.model.position == "rope":
            self.rotary = RotaryAngles(config.model, dtype)
        self._mark_copies(config)
        initialize(
            self,
            config,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
        )
        if self.is_frozen:
            for part in self._backbone():
                part.requires_grad_(False)

    def _backbone(self) -> list[torch.nn.Module]:
        """Return all modules except the early exits."""
        parts = [self.embedding, self.layers, self.output]
        if (final := str(self.final_boundary)) in self.exits:
            parts.append(self.exits[final])
        return [part for part in parts if part is not None]

    def train(self, mode: bool = True) -> "Stage":
        """Set training or evaluation mode; frozen modules stay in evaluation mode."""
        super().train(mode)
        if self.is_frozen:
            for part in self._backbone():
                part.eval()
        return self

    def _defer_weight_gradients(self, schedule: str, parts: TransformerConfig) -> None:
        """Let the schedule defer the weight gradients of layers and, optionally, of exits.

        Deferring those of an exit keeps the gradient of its logits in memory.
        """
        if uses_transformer_engine(parts):
            raise UserError(
                f"parallel.schedule = {schedule} cannot be used with training.dtype = bfloat16 on "
                "this machine: it splits the backward pass, which layers of Transformer Engine do "
                "not support. Set parallel.schedule to 1f1b or training.dtype to float32."
            )
        modules = [*self.layers.modules()]
        if schedule == "zero-bubble-exits":
            modules += self.exits.modules()
        for module in modules:
            if isinstance(module, ColumnLinear | RowLinear):
                module.weight_gradients = self.weight_gradients

    def _mark_copies(self, config: Config) -> None:
        """Mark the copies of weights that stages or exits share as `shared`, except the owner's.

        megatron-core omits them from the gradient norm. Its own mark, `shared_embedding`, is not
        set, because it puts the weight into a separate bucket: the distributed optimizer of 0.16.1
        loses the padding between buckets when it saves, which corrupts the moments after it.
        """
        self.copies: dict[str, int] = {}
        for name in ("embedding.word.weight", "output.weight"):
            stages = stages_with_weight(config, name)
            if self.index in stages and len(stages) > 1:
                weight = self.get_parameter(name)
                weight.shared = self.index != stages[0]
                self.copies[name] = stages.index(self.index)
        if config.exits.norm == "shared":
            head: Any
            for head in self.exits.values():
                for parameter in head.norm.parameters():
                    parameter.shared = not head.is_final

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Boundaries of the exits on this stage, in increasing order."""
        return tuple(self.output_weights)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        hidden: torch.Tensor | None = None,
        kept_rows: KeptRows | None = None,
        last_layer: int | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Run the layers of the stage.

        Args:
            tokens: Token ids [b, s].
            positions: Positions [b, s].
            hidden: The output of the previous stage, [s, b, h] ([s / t, b, h] if sequence
                parallel); None on the first stage.
            kept_rows: The samples that run each layer (layer dropout), by default all.
            last_layer: The layer after which to stop, by default the last one.

        Returns:
            The residual stream after the last computed layer, and the inputs of the exits up to it,
            in increasing order of boundaries.
        """
        if self.is_first:
            hidden = self.embedding(tokens, positions)
        assert hidden is not None, f"stage {self.index} needs hidden states"
        rotary = self._angles(positions)
        taps: dict[int, torch.Tensor] = {}
        for boundary in self.boundaries:
            if str(boundary) not in self.layers:  # A pre-exit at the start of the stage.
                taps[boundary] = hidden
        for number, layer in self.layers.items():
            if last_layer is not None and int(number) > last_layer:
                break
            head: Any = self.exits[number] if number in self.exits else None  # noqa: SIM401
            taps_attention = head is not None and head.taps_attention
            run = functools.partial(self._run_layer, layer, taps_attention)
            rows = None if kept_rows is None else kept_rows.get(int(number))
            if rows is None:
                hidden, attended = run(hidden, rotary)
            else:
                hidden, attended = run_on_rows(
                    run, hidden, rotary, rows, taps_attention=taps_attention
                )
            if head is not None:
                taps[head.boundary] = hidden if attended is None else attended
        return hidden, tuple(taps[boundary] for boundary in self.boundaries if boundary in taps)

    def _run_layer(
        self,
        layer: Any,
        taps_attention: bool,
        hidden: torch.Tensor,
        rotary: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the layer's output and, if requested, the residual stream after attention."""

        def run(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            attended: list[torch.Tensor] = []
            tap: AbstractContextManager[Any] = nullcontext()
            if taps_attention:
                tap = layer.pre_mlp_layernorm.register_forward_pre_hook(
                    lambda _, inputs: attended.append(inputs[0])
                )
            with tap, hidden_region(self.config, self.training):
                output, _ = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
            return (output, *attended)

        # Return the tap as an output of the recomputed region, so that its gradient flows back.
        recompute = self.recompute and torch.is_grad_enabled()
        outputs = checkpoint(run, False, hidden) if recompute else run(hidden)
        return outputs[0], outputs[1] if taps_attention else None

    def exit_logits(
        self, boundary: int, tap: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits [s, b, v / t] of an exit from its input."""
        name = self.output_weights[boundary]
        weight = None if name.startswith("exits.") else self.get_parameter(name)
        head = self.exits[str(boundary)]
        rotary = self._angles(positions) if head.block is not None else None
        return head(tap, rotary, weight)

    def normalized_final(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the final norm of the last stage's output, for `final_logits` on any stage."""
        head: Any = self.exits[str(self.final_boundary)]
        return head.norm(hidden)

    def final_logits(self, normalized: torch.Tensor) -> torch.Tensor:
        """Return the final exit's logits [s, b, v / t] on a stage with an exit that distills."""
        head: Any = next(iter(self.exits.values()))
        logits, _ = head.output(normalized, self.get_parameter(self.final_output_weight))
        return logits

    def _angles(self, positions: torch.Tensor) -> torch.Tensor | None:
        if self.rotary is None:
            return None
        return self.rotary(positions[:1] if self.shares_positions else positions)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Return megatron-core's sharded tensors by name, with copies of a weight as replicas."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
        for name, copy in self.copies.items():
            shard = state[prefix + name]
            shard.replica_id = (copy, *shard.replica_id[1:])
        return state
