"""The options of `ee-llm generate`, `ee-llm data generate` and `ee-llm verify`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ee_llm.inference.choices import (
    Attention,
    Bos,
    DeferralMode,
    DtypeName,
    Measure,
    Quantize,
)
from ee_llm.inference.decoding.settings import DoLaLayers, EarlyHead, SLEDLayers, SLEDVariant
from ee_llm.inference.strategies import Strategy


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Options of the commands that sample text: how prompts are encoded and tokens are drawn."""

    max_tokens: int = 64
    """Generate at most this many tokens."""

    temperature: float = 0.0
    """Divide the logits by this before sampling; 0 is greedy decoding."""

    top_k: int = 0
    """Sample only from this many most probable tokens; 0 is all."""

    top_p: float = 1.0
    """Sample only from the smallest set of tokens whose probabilities add up to at least this."""

    min_p: float = 0.0
    """Sample only from tokens with at least this share of the top token's probability; 0 is all."""

    seed: int = 0
    """Seed the sampling. The same seed gives the same text."""

    bos: Bos = "auto"
    """Begin prompts with the beginning-of-sequence token (on), or not (off). auto follows the
    tokenizer's settings."""

    parse_special: bool = False
    """Encode special tokens in the text of a prompt, such as <|im_end|>, as tokens. The messages of
    a chat are always encoded in this way."""


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Options of the commands that run an engine."""

    checkpoint: Path = field(kw_only=False)
    """Model to run: a checkpoint, or a run directory, of which the newest checkpoint is used."""

    chat_template: Path | None = None
    """Use the chat template (Jinja) in this file instead of the model's own."""

    dtype: DtypeName = "auto"
    """Compute with this precision; auto is bfloat16 if the device supports it in hardware, else
    float32."""

    quantize: Quantize = "none"
    """Store the weights of linear layers in 8 bits (int8, requires torchao). This saves memory, but
    the output cannot be verified."""

    max_num_seqs: int = 16
    """Run at most this many sequences at a time."""

    cache_tokens: int = 65536
    """Allocate a K/V cache for this many tokens of all sequences together, or fewer if the
    sequences cannot use more."""

    attention: Attention = "auto"
    """Compute attention with this kernel. auto selects the fastest one on this device. gather
    copies keys and values and runs on CPUs. varlen is torch's kernel with FlashAttention 3, and
    flash is flash-attn 2; both require a GPU and bfloat16. plain is a slow equivalent for tests."""

    cuda_graphs: bool = False
    """Replay passes of few rows as CUDA graphs. Requires varlen or flash, and --tensor 1."""

    compile: bool = False
    """Compile the layers with torch.compile. This starts more slowly, but is faster on a GPU."""

    tensor: int = 1
    """Use this many tensor-parallel ranks per pipeline stage."""

    pipeline: int = 1
    """Use this many pipeline stages."""

    timeout_s: float = 600
    """Abort if a rank receives nothing from another rank for this many seconds."""


@dataclass(frozen=True)
class GenerateOptions(SamplingOptions, ExecutionOptions):
    """The options of `ee-llm generate`."""

    prompt: str | None = None
    """Continue this text. (default: standard input, if it is not a terminal)"""

    prompt_file: Path | None = None
    """Continue the text in this file, including a line break at its end. '-' is standard input."""

    prompt_token_ids: tuple[int, ...] = ()
    """Continue these token ids."""

    chat: str | None = None
    """Answer this message of a user, formatted with the model's chat template. The name of an
    existing .json file has the same effect as --chat-file."""

    chat_file: Path | None = None
    """Answer the conversation in this JSON file, in OpenAI's format: a list of {"role", "content"},
    or an object with the list as "messages". '-' is standard input."""

    system: str | None = None
    """Add this system message to conversations that do not begin with one."""

    batch_file: Path | None = None
    """Generate for each line of this file, a JSON object with "prompt", "messages" or
    "prompt_token_ids", and optionally "id" and options of the prompt by name, with _ instead of -.
    All lines are decoded together, and the results are written to --output."""

    output: Path | None = None
    """Write the results of --batch-file to this file: one JSON object per line, as each prompt
    finishes. Prompts whose results are already in the file are not generated again."""

    thresholds: tuple[float | Literal["off"], ...] = (0.8,)
    """Exit if the confidence reaches this value in (0, 1], or off; one per exit, or one for all."""

    policy: Path | None = None
    """Read the exit policy from this JSON file, instead of --thresholds and --measure."""

    measure: Measure = "max_probability"
    """Measure confidence as the highest probability, as 1 - normalized entropy, as the highest
    minus the second highest probability, as agreement with the exit before, as the highest
    probability among the 16 best tokens of the first exit (shortlist), by how little the last layer
    turns the hidden state (saturation), or with gates, which 'ee-llm calibrate --train-gate'
    trains. saturation and gate decide before an exit computes logits."""

    strategy: Strategy = "exact"
    """Decode with this strategy. exact exits at the first confident exit. full runs every token
    through all layers. self-speculative drafts at an exit and checks with all layers; its output is
    that of full. propagate exits as exact does and uses the hidden state at the exit for all deeper
    layers (approximate). sled and dola run all layers and change the final logits with those of
    early layers."""

    draft_exit: int | None = None
    """Draft at this exit, with self-speculative. (default: the first exit)"""

    draft_length: int = 4
    """Draft at most this many tokens before all layers check them, with self-speculative."""

    draft_threshold: float | None = None
    """Draft only while the exit has at least this confidence, with self-speculative. (default: no
    limit)"""

    sled_rate: float = 1.0
    """Move the final logits toward the early layers by this step size (evolution rate)."""

    sled_scale: int = 10
    """Evolve this many most probable tokens, and draw only from them (evolution scale)."""

    sled_tau: float = 1.0
    """Divide the logits by this in the update; not used by the released variant."""

    sled_layers: tuple[int | SLEDLayers, ...] = ("all",)
    """Read early logits at these boundaries (0 is the embedding output), at all of them, or at
    alternate ones (every other one)."""

    sled_variant: SLEDVariant = "paper"
    """Follow the paper's algorithm (paper) or the authors' code (released)."""

    dola_layers: tuple[int | DoLaLayers | Literal["auto"], ...] = ("auto",)
    """Contrast with the early logits at this boundary. Of several, each token uses the one that
    differs most; low and high are every other boundary in one half of the model, or all its exits
    with --early-head exits. auto is low, and all exits with --early-head exits."""

    dola_alpha: float = 0.1
    """Draw only tokens with at least this share of the top token's probability, in (0, 1]."""

    early_head: EarlyHead | Literal["auto"] = "auto"
    """Compute early logits with the final exit's norm and output weight (final), with its output
    weight alone (raw), or with the exits' own heads (exits). auto is final, and raw with
    --sled-variant released."""

    min_tokens: int = 0
    """Do not stop before this many tokens."""

    stop: tuple[str, ...] = ()
    """Stop at these strings, which may be special tokens. The output ends before the string."""

    stop_token_ids: tuple[int, ...] = ()
    """Stop after these token ids, in addition to the model's end tokens."""

    ignore_eos: bool = False
    """Do not stop at the model's end tokens."""

    repetition_penalty: float = 1.0
    """Divide positive logits of tokens already in the text by this, and multiply negative ones by
    it; 1 is off."""

    logprobs: int | None = None
    """Report the log probabilities of this many most probable tokens in --json and --output."""

    deferral: DeferralMode = "auto"
    """Defer rows that did not exit until more of them can run together, if measurements at the
    start predict a speed-up (auto), or never (off)."""

    verify: bool = False
    """Check the output against its definition in float64, as 'ee-llm verify' does."""

    show_confidence: bool = False
    """Also print a table with the exit, confidence and log probability of each token."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, kw_only=True)
class DataGenerateOptions(SamplingOptions, ExecutionOptions):
    """The options of `ee-llm data generate`."""

    output: Path
    """Path of the files to write without .bin or .idx, for example data/own."""

    num_tokens: int | None = None
    """Generate whole documents until they have at least this many generated tokens. With --prompts,
    the first prompt follows again after the last one. (default with --prompts: one document for
    each prompt)"""

    prompts: Path | None = None
    """Continue the prompts in this file: one text per line or, in a .jsonl or .ndjson file, one
    JSON object per line with "prompt", "messages" or "prompt_token_ids". '-' is standard input,
    with JSON objects if the first line is one. (default: documents begin as those of training data
    do)"""

    jsonl: bool = False
    """Also write the text of each document to PREFIX.jsonl."""

    max_tokens: int = 1024
    """Generate at most this many tokens in a document."""

    temperature: float = 1.0
    """Divide the logits by this before sampling; 1 is the model's own distribution, and 0 is greedy
    decoding."""

    bos: Bos = "auto"
    """Begin documents with the beginning-of-sequence token (on), or not (off). auto follows the
    tokenizer's settings."""

    progress: bool = True
    """Show a progress bar on standard error if it is a terminal."""

    json: bool = False
    """Print one JSON object with the figures and nothing else."""


@dataclass(frozen=True)
class VerifyOptions:
    """The options of `ee-llm verify`."""

    file: Path
    """File to verify, written by 'ee-llm generate' with --output or --json."""

    checkpoint: Path
    """Model that generated the file: a checkpoint, or a run directory, of which the newest
    checkpoint is used."""

    json: bool = False
    """Print one JSON object with the divergences and nothing else."""
