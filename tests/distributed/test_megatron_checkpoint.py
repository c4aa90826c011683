"""Conversion of distributed checkpoints that megatron-core writes from its own GPTModel."""

import argparse
import multiprocessing

import pytest
import torch

from ee_llm import distributed
from ee_llm.architecture.reference import ReferenceModel
from ee_llm.conversion.open_source import open_source
from tests.distributed.harness import run_ranks

distributed.enable_megatron()
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

TOKENS = torch.tensor([5, 1, 200, 31, 31, 7, 258, 0, 99])
PADDED, VOCABULARY = 288, 260
LLAMA = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
}
GPT = LLAMA | {"normalization": "LayerNorm", "add_bias_linear": True, "num_query_groups": 4}


def arguments_of(kind, tied):
    sizes = LLAMA if kind == "llama" else GPT
    return argparse.Namespace(
        **sizes,
        group_query_attention=kind == "llama",
        swiglu=kind == "llama",
        bias_gelu_fusion=kind == "gpt",
        position_embedding_type="rope" if kind == "llama" else "learned_absolute",
        rotary_base=500,
        max_position_embeddings=16,
        padded_vocab_size=PADDED,
        vocab_size=VOCABULARY,
        tokenizer_type="HuggingFaceTokenizer",
        untie_embeddings_and_output_weights=not tied,
        norm_epsilon=1e-5,
        params_dtype=torch.float32,
    )


def build(kind, tied, tensor, pipeline, is_stacked):
    distributed.initialize(tensor=tensor, pipeline=pipeline, timeout_s=60, seed=3)
    gated = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    config = TransformerConfig(
        **(LLAMA | gated if kind == "llama" else GPT | {"bias_activation_fusion": True}),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.3,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        hetereogenous_dist_checkpoint=not is_stacked,
    )
    torch.manual_seed(11)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=config.normalization),
        PADDED,
        16,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope" if kind == "llama" else "learned_absolute",
        rotary_base=500,
    ).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # norms and biases are initially ones and zeros, which would hide errors
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def write(path, kind, tied, is_stacked):
    """Save from one rank and return the logits."""
    model = build(kind, tied, 1, 1, is_stacked)
    save(path, model, arguments_of(kind, tied))
    positions = torch.arange(len(TOKENS))[None]
    mask = torch.ones(len(TOKENS), len(TOKENS), dtype=torch.bool).triu(1)[None, None]
    torch.compiler.set_stance("force_eager")  # compiling the fused GELU would take 20 s
    with torch.no_grad():
        return model(TOKENS[None], positions, mask)[0]


def save(path, model, arguments):
    multiprocessing.current_process()._config["daemon"] = False  # the writer starts a process
    path.mkdir(exist_ok=True)
    state = model.sharded_state_dict()
    content = {"args": arguments, "checkpoint_version": 3.0, "iteration": 12, **state}
    dist_checkpointing.save(content, str(path))


def reshard(before, after, kind, tied, tensor, pipeline):
    """Load with megatron-core in another layout and save again."""
    model = build(kind, tied, tensor, pipeline, is_stacked=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    loaded = dist_checkpointing.load(model.sharded_state_dict(), str(before))
    model.load_state_dict({name: loaded[name] for name in model.state_dict() if name in loaded})
    save(after, model, arguments_of(kind, tied))


@pytest.mark.parametrize(
    ("kind", "tied", "is_stacked"),
    [("llama", False, True), ("llama", False, False), ("gpt", True, True)],
)
def test_logits_equal_those_of_megatron_core(tmp_path, kind, tied, is_stacked):
    [expected] = run_ranks(1, write, tmp_path / "iter_0000012", kind, tied, is_stacked)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    source = open_source(tmp_path, tokenizer="bytes")
    tensors = {name: source.tensor(name) for name in source.specs}
    found = ReferenceModel(source.config, tensors, torch.float32).forward(TOKENS)[4]
    assert found.shape == (len(TOKENS), VOCABULARY)
    assert expected.abs().max() > 1
    torch.testing.assert_close(found, expected[:, :VOCABULARY], rtol=1e-5, atol=1e-5)
    if kind == "llama" and is_stacked:
        run_ranks(4, reshard, tmp_path / "iter_0000012", tmp_path / "other", kind, tied, 2, 2)
        other = open_source(tmp_path / "other", tokenizer="bytes")
        for name, tensor in tensors.items():
            assert torch.equal(other.tensor(name), tensor), name
