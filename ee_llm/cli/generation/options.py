"""The options of `ee-llm generate` and `ee-llm verify`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ee_llm.inference.execution.paged_attention import Attention
from ee_llm.inference.exits.policy import Measure
from ee_llm.inference.strategies import Strategy

Bos = Literal["auto", "on", "off"]
DtypeName = Literal["auto", "float32", "bfloat16", "float64"]


@dataclass(frozen=True)
class GenerateOptions:
    """Continue one prompt, or a file of them, and show at which exit each token left."""

    checkpoint: Path
    """Checkpoint directory, or the run directory that holds it (then its newest one)."""

    prompt: str | None = None
    """The text to continue. Without any prompt, standard input is read, unless it is a terminal."""

    prompt_file: Path | None = None
    """File whose text is continued, to its last character. '-' is standard input."""

    prompt_ids: tuple[int, ...] = ()
    """Continue these token ids, as they are."""

    chat: str | None = None
    """Answer this message of a user, through the model's own chat template. The name of a .json
    file is read as --chat-file."""

    chat_file: Path | None = None
    """Answer the conversation in this JSON file, in OpenAI's format: a list of {"role", "content"},
    or an object with the list as "messages". '-' is standard input."""

    system: str | None = None
    """System message of conversations that do not begin with one."""

    chat_template: Path | None = None
    """File with the chat template (Jinja) to use in place of the model's own."""

    batch_file: Path | None = None
    """File with one JSON object per line: "prompt", "messages" or "prompt_token_ids", and if wanted
    "id" and any of the options below by name, with _ for -. All are decoded together, into
    --output."""

    output: Path | None = None
    """File that gets one JSON object per line of --batch-file, as they finish. If it is there
    already, what it holds is not done again."""

    thresholds: tuple[float | Literal["off"], ...] = (0.8,)
    """Confidence at which a token leaves, in (0, 1], or off: one per exit, or one for all."""

    measure: Measure = "max_probability"
    """What confidence is: the top token's probability, 1 - normalized entropy, or top-1 - top-2."""

    strategy: Strategy = "exact"
    """exact leaves at the first confident exit; full runs every token through all layers; verify
    drafts at an exit and lets all layers check, with the output of full; propagate leaves as exact
    does and takes the state at the exit for that of all deeper layers (approximate)."""

    draft_exit: int | None = None
    """For verify: the exit (the layer it follows) that drafts; the first one unless given."""

    draft_length: int = 4
    """For verify: most tokens drafted before all layers check them."""

    draft_threshold: float | None = None
    """For verify: draft only while the exit's confidence reaches this; always unless given."""

    bos: Bos = "auto"
    """Whether the prompt's tokens begin with the tokenizer's beginning-of-sequence token: auto does
    as the tokenizer's file or settings say, on and off whatever they say."""

    parse_special: bool = False
    """Read special tokens that a --prompt spells out, such as <|im_end|>, as these tokens. Chats
    always do."""

    max_new_tokens: int = 64
    """Number of tokens after which to stop; the model's own end tokens stop too."""

    stop: tuple[str, ...] = ()
    """Stop at these texts, special tokens among them; the output ends before them."""

    stop_token_ids: tuple[int, ...] = ()
    """Stop after these tokens, besides the model's own end tokens."""

    ignore_eos: bool = False
    """Do not stop at the model's own end tokens."""

    temperature: float = 0.0
    """Divides the logits before drawing; 0 takes the most probable token (greedy)."""

    top_k: int = 0
    """Draw from this many most probable tokens only; 0 is all."""

    top_p: float = 1.0
    """Draw from the fewest most probable tokens that hold this share of the probability."""

    min_p: float = 0.0
    """Draw only from tokens with at least this share of the top token's probability; 0 is all."""

    repetition_penalty: float = 1.0
    """Divides positive logits of tokens already seen and multiplies negative ones; 1 is off."""

    seed: int = 0
    """Seed of the draws; the same seed gives the same text."""

    dtype: DtypeName = "auto"
    """Precision to compute in; auto is bfloat16 where the device is made for it, else float32."""

    quantize: Literal["none", "int8"] = "none"
    """int8: weights of linear layers in 8 bits, with a scale for each output (needs torchao). Less
    memory; the output is another model's, which --verify can not check."""

    batch_size: int = 16
    """Sequences that run at once."""

    cache_tokens: int = 65536
    """Positions that the cache of keys and values holds, of all sequences together; no more than
    can be used are taken."""

    deferral: Literal["auto", "off"] = "auto"
    """auto: rows that declined an exit wait for others where that pays (measured at the start)."""

    attention: Attention = "auto"
    """auto: the best kernel over a paged cache that this device has; gather copies what it reads,
    as on a CPU; varlen is torch's with FlashAttention 3, flash is flash-attn 2 (both need a GPU
    and bfloat16); plain is their slow twin, for checking."""

    graphs: bool = False
    """Replay passes of few rows as CUDA graphs (needs varlen or flash; no tensor ranks)."""

    compile: bool = False
    """Run the layers through torch.compile: for a GPU; slow to start, faster after."""

    tensor: int = 1
    """Tensor-parallel ranks to start, of each pipeline stage."""

    pipeline: int = 1
    """Pipeline stages to start."""

    timeout_s: float = 600
    """Seconds after which a rank that hears nothing from another gives up."""

    verify: bool = False
    """Check what was generated against its definition in float64, see 'ee-llm verify'."""

    show_confidence: bool = False
    """Also print a table with the exit, confidence and log probability of each token."""

    json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True)
class VerifyOptions:
    """Check finished generations against their definition: one forward over each, in float64."""

    file: Path
    """What 'ee-llm generate --json' printed or --output holds: one JSON object per line."""

    checkpoint: Path
    """The model that made them: a checkpoint directory, or a run directory (its newest)."""

    json: bool = False
    """Print one JSON object with the divergences and nothing else."""
