"""The options of `ee-llm generate` and `ee-llm verify`."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class GenerateOptions:
    """Continue one prompt, or a file of them, and show at which exit each token exited."""

    checkpoint: Path
    """Checkpoint directory, or the run directory that holds it (then its newest one)."""

    prompt: str | None = None
    """Text to continue. Without any prompt, standard input is read, unless it is a terminal."""

    prompt_file: Path | None = None
    """File whose text is continued, to its last character. '-' is standard input."""

    prompt_token_ids: tuple[int, ...] = ()
    """Token ids to continue."""

    chat: str | None = None
    """Message of a user to answer, in the format of the model's chat template. The name of a .json
    file is read as --chat-file."""

    chat_file: Path | None = None
    """JSON file with a conversation to answer, in OpenAI's format: a list of {"role", "content"},
    or an object with the list as "messages". '-' is standard input."""

    system: str | None = None
    """System message of conversations that do not begin with one."""

    chat_template: Path | None = None
    """File with a chat template (Jinja) to use instead of the model's own."""

    batch_file: Path | None = None
    """File with one JSON object per line: "prompt", "messages" or "prompt_token_ids", and
    optionally "id" and any of the options below by name, with _ for -. All lines are decoded
    together; the results go to --output."""

    output: Path | None = None
    """File for one JSON object per line of --batch-file, written as they finish. Lines that an
    existing file already has are not generated again."""

    thresholds: tuple[float | Literal["off"], ...] = (0.8,)
    """Confidence at which a token exits, in (0, 1], or off: one per exit, or one for all."""

    policy: Path | None = None
    """JSON file with an exit policy, instead of --thresholds and --measure."""

    measure: Measure = "max_probability"
    """Measure of confidence: the greatest probability, 1 - normalized entropy, or the greatest
    probability minus the second greatest."""

    strategy: Strategy = "exact"
    """exact exits at the first confident exit. full runs every token through all layers.
    self-speculative drafts at an exit and checks with all layers; its output is that of full.
    propagate exits as exact does and uses the state at the exit for all deeper layers
    (approximate). sled and dola run all layers and contrast the final logits with those of early
    layers."""

    draft_exit: int | None = None
    """Exit that drafts, for self-speculative; the first exit by default."""

    draft_length: int = 4
    """Greatest number of tokens drafted before all layers check them, for self-speculative."""

    draft_threshold: float | None = None
    """Draft only while the exit's confidence reaches this, for self-speculative; else always."""

    sled_rate: float = 1.0
    """Step size by which the final logits follow the early layers (evolution rate)."""

    sled_scale: int = 10
    """Number of most probable tokens that evolve and may be drawn (evolution scale)."""

    sled_tau: float = 1.0
    """Temperature of the distributions in the update; not used by the released variant."""

    sled_layers: tuple[int | SLEDLayers, ...] = ("all",)
    """Boundaries of the early logits (0 is the embedding output), all, or alternate (every other
    one)."""

    sled_variant: SLEDVariant = "paper"
    """paper follows the paper's algorithm, released the authors' code."""

    dola_layers: tuple[int | DoLaLayers, ...] = ("low",)
    """Candidate boundaries of the layer to contrast with; low and high are every other boundary in
    one half of the model. Of several, each row uses the one that differs most."""

    dola_alpha: float = 0.1
    """Draw only tokens with at least this share of the top token's probability, in (0, 1]."""

    early_head: EarlyHead | Literal["auto"] = "auto"
    """What computes early logits for sled and dola: the final exit's norm and output weight
    (final), its output weight alone (raw), or the exits' own heads (exits). auto is final, and raw
    with --sled-variant released."""

    bos: Bos = "auto"
    """Whether prompts begin with the beginning-of-sequence token. auto follows the tokenizer's
    settings; on and off override them."""

    parse_special: bool = False
    """Read special tokens that a --prompt spells out, such as <|im_end|>, as tokens. Chats always
    do."""

    max_tokens: int = 64
    """Number of tokens after which to stop. The model's end tokens stop earlier."""

    min_tokens: int = 0
    """Number of tokens before which nothing stops."""

    stop: tuple[str, ...] = ()
    """Texts to stop at, including special tokens; the output ends before them."""

    stop_token_ids: tuple[int, ...] = ()
    """Token ids to stop after, besides the model's end tokens."""

    ignore_eos: bool = False
    """Do not stop at the model's end tokens."""

    temperature: float = 0.0
    """Divide the logits by this before drawing; 0 takes the most probable token (greedy)."""

    top_k: int = 0
    """Draw from this many most probable tokens only; 0 is all."""

    top_p: float = 1.0
    """Draw from the fewest most probable tokens that hold this share of the probability."""

    min_p: float = 0.0
    """Draw only from tokens with at least this share of the top token's probability; 0 is all."""

    repetition_penalty: float = 1.0
    """Divide positive logits of tokens already seen by this, multiply negative ones; 1 is off."""

    seed: int = 0
    """Seed of the draws; the same seed gives the same text."""

    logprobs: int | None = None
    """Report the log probabilities of this many most probable tokens in --json and --output."""

    dtype: DtypeName = "auto"
    """Precision to compute in; auto is bfloat16 if the device supports it in hardware, else
    float32."""

    quantize: Quantize = "none"
    """Keep the weights of linear layers in 8 bits (int8, needs torchao). It saves memory; --verify
    cannot check the output."""

    max_num_seqs: int = 16
    """Greatest number of sequences that run at once."""

    cache_tokens: int = 65536
    """Size of the K/V cache in positions of all sequences together. No more than can be used is
    allocated."""

    deferral: DeferralMode = "auto"
    """Let rows that did not exit wait for others where that pays (auto, measured at the start)."""

    attention: Attention = "auto"
    """Attention kernel. auto takes the best one of this device. gather copies what it reads and
    runs on a CPU; varlen is torch's with FlashAttention 3, flash is flash-attn 2 (both need a GPU
    and bfloat16); plain is their slow twin, for checking."""

    cuda_graphs: bool = False
    """Replay passes of few rows as CUDA graphs (needs varlen or flash, and --tensor 1)."""

    compile: bool = False
    """Run the layers through torch.compile: slower to start, then faster on a GPU."""

    tensor: int = 1
    """Number of tensor-parallel ranks of each pipeline stage."""

    pipeline: int = 1
    """Number of pipeline stages."""

    timeout_s: float = 600
    """Seconds after which a rank that hears nothing from another one gives up."""

    verify: bool = False
    """Check the output against its definition in float64, as 'ee-llm verify' does."""

    show_confidence: bool = False
    """Print a table with the exit, confidence and log probability of each token as well."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class VerifyOptions:
    """Check finished generations against their definition, with one float64 forward over each."""

    file: Path
    """File that 'ee-llm generate' wrote with --output or --json: one JSON object per line."""

    checkpoint: Path
    """Model that generated them: a checkpoint directory, or a run directory for its newest one."""

    json: bool = False
    """Print one JSON object with the divergences and nothing else."""
