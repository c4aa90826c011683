"""Small tokenizers built like those of well-known model families, with their settings files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "The capital of France is Paris. What is the capital of Italy?",
    "def area(width, height):\n    return width * height\n",
    "user assistant system You are a helpful assistant. Hello there, how are you today?",
    "naïve café – 日本語 über 12345 tokens",
] * 4

_GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_QWEN_SPLIT = _GPT4_SPLIT.replace("{1,3}", "")

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}"
    "{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
LLAMA3 = """\
{{- bos_token }}
{%- if strftime_now is defined %}
    {%- set year = strftime_now("%Y") %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\nToday's year: " + year + "\\n<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- continue %}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
        + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% elif message['role'] == 'system' %}"
    "{{ '[INST] ' + message['content'] + '\n\n[/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}"
    "{% set ns = namespace(system='') %}{%- for message in messages %}"
    "{%- if message['role'] == 'system' %}{% set ns.system = message['content'] %}{%- endif %}"
    "{%- endfor %}{{bos_token}}{{ns.system}}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{'<｜User｜>' + message['content']}}{%- endif %}"
    "{%- if message['role'] == 'assistant' %}"
    "{{'<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>'}}{%- endif %}{%- endfor -%}"
    "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\n'}}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else 'user' %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


class Family(NamedTuple):
    """The tokenizer of a family, its settings files, and a text with its special tokens."""

    make: Callable[[], Tokenizer]
    config: dict[str, Any]
    eos: list[str]  # in generation_config.json
    special: str  # a prompt that contains special tokens
    template: str | list[dict[str, str]] | None = None


def _byte_level(special: list[str | AddedToken], split: str | None, bos: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parts, level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    for token in special:
        if isinstance(token, AddedToken):
            tokenizer.add_tokens([token])
        else:
            tokenizer.add_special_tokens([token])
    level_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = level_processor
    if bos:
        template = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
        tokenizer.post_processor = processors.Sequence([level_processor, template])
    return tokenizer


def _byte_fallback(special: list[str], prefix: str, bos: str | None = None) -> Tokenizer:
    """Return a SentencePiece BPE model as transformers converts it, with byte fallback."""
    base = Tokenizer(models.BPE())
    base.normalizer = normalizers.Replace(" ", "▁")
    base.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    base.train_from_iterator(
        [text.replace("日本語", "") for text in TEXTS],
        trainers.BpeTrainer(vocab_size=300, show_progress=False),
    )
    trained = json.loads(base.to_str())["model"]
    names = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [name for name in trained["vocab"] if name not in names]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [tuple(merge) for merge in trained["merges"]]
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "always":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        parts.append(decoders.Strip(" ", 1, 0))
    elif prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
        parts.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(special)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
        )
    return tokenizer


def _unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def _fast(**more: Any) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", **more}


FAMILIES: dict[str, Family] = {
    "llama-2": Family(
        lambda: _byte_fallback(["<unk>", "<s>", "</s>"], "always", "<s>"),
        {
            "tokenizer_class": "LlamaTokenizer",
            "add_bos_token": True,
            "add_eos_token": False,
            "legacy": False,
            **{"bos_token": {"content": "<s>", "__type": "AddedToken"}, "unk_token": "<unk>"},
            "eos_token": {"content": "</s>", "__type": "AddedToken", "lstrip": False},
        },
        ["</s>"],
        "<s>[INST] Hello [/INST] Hi </s><s>[INST] 日本 [/INST]",
        LLAMA2,
    ),
    "llama-3.1": Family(
        lambda: _byte_level(
            [
                *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"),
                *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
            ],
            _GPT4_SPLIT,
            "<|begin_of_text|>",
        ),
        _fast(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>",
        LLAMA3,
    ),
    "qwen-2.5": Family(
        lambda: _byte_level(
            [
                *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
                AddedToken("<tool_call>", special=False, normalized=False),
            ],
            _QWEN_SPLIT,
            None,
        ),
        {
            "tokenizer_class": "Qwen2Tokenizer",
            **{"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        },
        ["<|im_end|>", "<|endoftext|>"],
        "<|im_start|>user\nHello <tool_call> there<|im_end|>\n<|im_start|>assistant\n",
        QWEN,
    ),
    "gpt-2": Family(
        lambda: _byte_level(["<|endoftext|>"], None, None),
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
        | {"bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
        ["<|endoftext|>"],
        "One text.<|endoftext|>Another <|endoftext|>",
    ),
    "smollm-2": Family(
        lambda: _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, None),
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>"}
        | {"eos_token": "<|im_end|>", "unk_token": "<|endoftext|>", "pad_token": "<|im_end|>"},
        ["<|im_end|>"],
        "<|im_start|>user\nHello<|im_end|>\n",
        CHATML,
    ),
    "mistral": Family(
        lambda: _byte_fallback(
            ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"], "first", "<s>"
        ),
        _fast(bos_token="<s>", eos_token="</s>", unk_token="<unk>", legacy=False),
        ["</s>"],
        "<s>[INST] Hello there[/INST] Hi</s>",
        [{"name": "default", "template": MISTRAL}, {"name": "tool_use", "template": "{{ 1 }}"}],
    ),
    "deepseek": Family(
        lambda: _byte_level(
            [
                *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
                AddedToken("<｜User｜>", special=False, normalized=False),
                AddedToken("<｜Assistant｜>", special=False, normalized=False),
                AddedToken("<think>", special=False, normalized=False),
            ],
            _GPT4_SPLIT,
            "<｜begin▁of▁sentence｜>",
        ),
        _fast(
            bos_token={"__type": "AddedToken", "content": "<｜begin▁of▁sentence｜>"},
            eos_token={"__type": "AddedToken", "content": "<｜end▁of▁sentence｜>"},
            pad_token={"__type": "AddedToken", "content": "<｜▁pad▁｜>"},
        ),
        ["<｜end▁of▁sentence｜>"],
        "<｜begin▁of▁sentence｜><｜User｜>Hello<｜Assistant｜>Hi<｜end▁of▁sentence｜>",
        DEEPSEEK,
    ),
    "gemma": Family(
        lambda: _byte_fallback(
            ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
            "never",
            "<bos>",
        ),
        _fast(bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"),
        ["<eos>", "<end_of_turn>"],
        "<bos><start_of_turn>user\nHello  there<end_of_turn>\n",
        GEMMA,
    ),
    "unigram": Family(
        _unigram,
        _fast(eos_token="</s>", unk_token="<unk>", pad_token="<pad>"),
        ["</s>"],
        "Hello there</s> France",
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}",
    ),
}


def write_family(name: str, folder: Path, template_file: bool = False) -> Path:
    """Write the files of a family's folder on the Hugging Face Hub, except the weights."""
    family = FAMILIES[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = family.make()
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = [tokenizer.token_to_id(token) for token in family.eos]
    added = {
        str(i): {
            "content": token.content,
            "special": token.special,
            **{k: getattr(token, k) for k in ("lstrip", "rstrip", "normalized", "single_word")},
        }
        for i, token in tokenizer.get_added_tokens_decoder().items()
    }
    config = {**family.config, "added_tokens_decoder": added}
    if family.template is not None and not template_file:
        config["chat_template"] = family.template
    elif isinstance(family.template, str):
        (folder / "chat_template.jinja").write_text(family.template)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": eos if len(eos) > 1 else eos[0]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
    return folder
