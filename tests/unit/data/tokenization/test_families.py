"""Tokenizers of well-known families compared with transformers.

The tokenizers are small but built like the real ones: the same kinds of models, normalizers,
decoders and post-processors, special tokens with the same names, and the same settings files.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from ee_llm.checkpoint.tokenizer import ORIGIN, settings_of
from ee_llm.data.prepare import PrepareOptions, check_tokenizer, prepare
from ee_llm.data.tokenization.chat_template import load_chat_template
from ee_llm.data.tokenization.tokenizer import load_tokenizer
from tests.unit.data.conftest import read_documents
from tests.unit.data.tokenization.families import FAMILIES, TEXTS, write_family

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "  日本語 <b>naïve</b>\n\n"}],
    [
        {"role": "system", "content": "Be kind & short."},
        {"role": "user", "content": "Hello there"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "A second question </s> <|im_end|>", "name": None},
    ],
]


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(name, tmp_path_factory.mktemp("families") / name)


def _reference(name: str, folder: Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Version 5 rebuilds the pipeline of LlamaTokenizer, which then adds no space after a special
    # token, unlike Llama 2's tokenizer.json. This class uses the file unchanged.
    kind = PreTrainedTokenizerFast if name == "llama-2" else AutoTokenizer
    return kind.from_pretrained(folder)


def test_end_tokens_equal_those_of_transformers(name: str, folder: Path) -> None:
    from transformers import GenerationConfig

    tokenizer, reference = load_tokenizer(folder / "tokenizer.json"), _reference(name, folder)
    expected = GenerationConfig.from_pretrained(folder).eos_token_id
    assert list(tokenizer.eos_token_ids) == (expected if isinstance(expected, list) else [expected])
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.bos_token_id == reference.bos_token_id
    (folder / "generation_config.json").rename(folder / "hidden")
    try:
        assert load_tokenizer(folder / "tokenizer.json").eos_token_ids == (0,)  # From config.json.
    finally:
        (folder / "hidden").rename(folder / "generation_config.json")


def test_parsed_special_tokens_equal_those_of_transformers(name: str, folder: Path) -> None:
    tokenizer, reference = load_tokenizer(folder / "tokenizer.json"), _reference(name, folder)
    for text in (FAMILIES[name].special, *TEXTS[:4]):
        expected = reference(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text, parse_special=True) == expected
        assert tokenizer.decode(expected) == reference.decode(expected, skip_special_tokens=True)
    special = set(tokenizer.special_tokens.values())
    assert special == set(reference.all_special_ids) | special
    assert special & set(tokenizer.encode(FAMILIES[name].special, parse_special=True))
    if name != "unigram":  # Its vocabulary has them as pieces, which the model can choose.
        assert not special & set(tokenizer.encode(FAMILIES[name].special))


def test_chats_are_rendered_as_by_transformers(name: str, folder: Path) -> None:
    tokenizer, reference = load_tokenizer(folder / "tokenizer.json"), _reference(name, folder)
    if FAMILIES[name].template is None:
        with pytest.raises(ValueError, match=r"no chat template: .* chat_template"):
            load_chat_template(tokenizer)
        return
    template = load_chat_template(tokenizer)
    for messages in CONVERSATIONS:
        text = template.render(messages)
        options = {"add_generation_prompt": True}
        assert text == reference.apply_chat_template(messages, tokenize=False, **options)
        expected = reference.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
        assert tokenizer.encode(text, parse_special=True) == expected


def test_separate_template_file_has_precedence(tmp_path: Path) -> None:
    folder = write_family("qwen-2.5", tmp_path, template_file=True)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert tokenizer.settings.template_path == folder / "chat_template.jinja"
    expected = _reference("qwen-2.5", folder).apply_chat_template(
        CONVERSATIONS[0], tokenize=False, add_generation_prompt=True
    )
    assert load_chat_template(tokenizer).render(CONVERSATIONS[0]) == expected


def test_precedence_of_end_token_sources(tmp_path: Path) -> None:
    """A token defined in a file has precedence over a common name."""
    folder = write_family("deepseek", tmp_path)
    for file in ("generation_config.json", "config.json"):
        (folder / file).unlink()
    end = load_tokenizer(folder / "tokenizer.json").eos_token_id
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder / "tokenizer.json").eos_token_ids == (end,)
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<think>"}}')
    think = load_tokenizer(folder / "tokenizer.json")
    assert think.decode([think.eos_token_id]) == ""  # Special, as a file defines it so.
    assert think.eos_token_ids == (think.eos_token_id,) != (end,)
    settings["eos_token"] = "<｜User｜>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(folder / "tokenizer.json").eos_token_id not in (think.eos_token_id, end)
    (folder / "config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_tokenizer(folder / "tokenizer.json").eos_token_ids == (7, 8)


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "\xff"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "generation_config.json"])
def test_damaged_file_is_named(tmp_path: Path, file: str, content: str) -> None:
    folder = write_family("gpt-2", tmp_path)
    (folder / file).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{file} .*Download it again"):
        load_tokenizer(folder / "tokenizer.json")


@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_parses_special_tokens(tmp_path: Path, legacy: bool) -> None:
    """Includes tokens added by the files next to it, as in early fine-tuned Llama models.

    For current models, the reference is the class of transformers.
    """
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "added_tokens.json").write_text('{"<|im_start|>": 340, "<|im_end|>": 341}')
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    assert (tokenizer.eos_token_id, tokenizer.vocab_size, tokenizer.bos_token_id) == (341, 342, 1)
    text = "<s><|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant"
    ids = tokenizer.encode(text, parse_special=True)
    assert [i for i in ids if i in (1, 340, 341)] == [1, 340, 341, 340]
    assert not {1, 340, 341} & set(tokenizer.encode(text))
    user = ids[2 : ids.index(341)]
    model = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    assert model.decode(user) == "user\nHello there"
    assert model.id_to_piece(user)[0].startswith("▁") is legacy
    # No file defines <|im_start|> as special, so it is part of the text.
    shown = tokenizer.decode(ids).replace(" \n", "\n")
    assert shown == "<|im_start|>user\nHello there\n<|im_start|>assistant"


def test_documents_end_with_the_token_defined_in_the_files(
    name: str, folder: Path, tmp_path: Path
) -> None:
    """The DeepSeek tokenizer has none of the names of other families."""
    (tmp_path / "a.txt").write_text("Hello there")
    path = folder / "tokenizer.json"
    options = {"tokenizer": str(path), "workers": 2 if name == "deepseek" else 1, "progress": False}
    prepare(PrepareOptions((tmp_path / "a.txt",), tmp_path / "a", **options))
    tokenizer = load_tokenizer(path)
    assert read_documents(tmp_path / "a") == [
        [*tokenizer.encode("Hello there"), tokenizer.eos_token_id]
    ]
    assert tokenizer.eos_token_id == _reference(name, folder).eos_token_id
    check_tokenizer(tmp_path / "a", tokenizer)


def test_end_of_document_token_can_be_given(tmp_path: Path) -> None:
    folder = write_family("deepseek", tmp_path / "x")
    (tmp_path / "a.txt").write_text("Hello there")
    options = {"tokenizer": str(folder / "tokenizer.json"), "eos_token": "<｜▁pad▁｜>"}
    prepare(PrepareOptions((tmp_path / "a.txt",), tmp_path / "a", **options))
    named = load_tokenizer(folder / "tokenizer.json", "<｜▁pad▁｜>")
    assert read_documents(tmp_path / "a")[0][-1] == named.eos_token_id
    check_tokenizer(tmp_path / "a", named)
    with pytest.raises(ValueError, match=r"prepared with end-of-document token .*data\.eos_token"):
        check_tokenizer(tmp_path / "a", load_tokenizer(folder / "tokenizer.json"))
    options["eos_token"] = "<eos>"
    with pytest.raises(ValueError, match="'<eos>', is not in the vocabulary"):
        prepare(PrepareOptions((tmp_path / "a.txt",), tmp_path / "b", **options))


def test_checkpoint_has_the_settings_of_its_tokenizer(tmp_path: Path) -> None:
    """A model trained from scratch with a folder's tokenizer must use the same end token."""
    folder = write_family("deepseek", tmp_path / "source")
    checkpoint = tmp_path / "checkpoint"
    for name, content in settings_of(str(folder / "tokenizer.json")).items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_bytes(content)
    assert sorted(path.name for path in (checkpoint / ORIGIN).iterdir()) == [
        "tokenizer_config.json"
    ]
    (checkpoint / "tokenizer").mkdir()
    copy = checkpoint / "tokenizer" / "tokenizer.json"
    copy.write_bytes((folder / "tokenizer.json").read_bytes())
    assert (
        load_tokenizer(copy).eos_token_id == load_tokenizer(folder / "tokenizer.json").eos_token_id
    )
    assert settings_of(str(copy)) == settings_of(str(folder / "tokenizer.json"))
    assert settings_of("bytes") == {}


def _with_padding(name: str, folder: Path) -> tuple[Path, int]:
    """Write the files of a family with a padding token for which the embedding has no row."""
    write_family(name, folder)
    model = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    size = model.get_vocab_size()
    model.add_special_tokens(["<pad>"])
    model.save(str(folder / "tokenizer.json"))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["pad_token"] = "<pad>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder, size


@pytest.mark.parametrize("name", ["llama-2", "qwen-2.5"])
def test_added_token_without_embedding_is_ignored(name: str, tmp_path: Path) -> None:
    """As in copies of Llama 2, where <pad> has id 32000 and the embedding has 32000 rows."""
    folder, size = _with_padding(name, tmp_path)
    complete = load_tokenizer(folder / "tokenizer.json")
    assert (complete.vocab_size, complete.encode("<pad>", parse_special=True)) == (size + 1, [size])
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}))
    reduced = load_tokenizer(folder / "tokenizer.json")
    assert (reduced.vocab_size, reduced.tokens_without_embedding) == (size, ["<pad>"])
    assert "<pad>" not in reduced.special_tokens
    assert reduced.decode(ids := reduced.encode("a<pad>b", parse_special=True)) == "a<pad>b"
    assert max(ids) < size
    for text in (FAMILIES[name].special, *TEXTS[:4]):
        assert reduced.encode(text, parse_special=True) == complete.encode(text, parse_special=True)
    # A base vocabulary that is too large belongs to another model and is not changed.
    (folder / "config.json").write_text(json.dumps({"vocab_size": 9}))
    assert load_tokenizer(folder / "tokenizer.json").vocab_size > 9


def test_sentencepiece_ignores_tokens_without_embedding(
    sentencepiece_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model.read_bytes())
    size = load_tokenizer(path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    assert load_tokenizer(path).vocab_size == size + 1
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": size}))
    reduced = load_tokenizer(path)
    assert (reduced.vocab_size, reduced.tokens_without_embedding) == (size, ["<pad>"])
    assert reduced.decode(reduced.encode("a<pad>b", parse_special=True)) == "a<pad>b"


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}},
        {"added_tokens_decoder": {"5": {"content": "\ud800", "special": True}}},
        {"pad_token": "\ud800"},
    ],
    ids=["id with 5000 digits", "token that is not text", "pad_token that is not text"],
)
def test_invalid_tokens_are_ignored(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write_family("qwen-2.5", tmp_path)
    expected = load_tokenizer(folder / "tokenizer.json").special_tokens
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    assert load_tokenizer(folder / "tokenizer.json").special_tokens == expected


def test_newlines_after_a_special_token_are_kept(tmp_path: Path) -> None:
    """Some SentencePiece models have a piece of two newlines."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n\n"],
    )
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    tokenizer = load_tokenizer(tmp_path / "tokenizer.model")
    for text in ("\n", "\n\n", "\n\nThe capital", "\n\n\nThe", "The capital", " The", "é"):
        ids = tokenizer.encode(f"</s>x</s>{text}", parse_special=True)
        assert tokenizer.decode(ids).removeprefix("x") == text
