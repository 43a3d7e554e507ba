"""Tokenizers that are rarely met: ends of text that no vocabulary has, spaces and markers that meet, what gets lost."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as sp
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_special_tokens import END, FAST, GPT2_CONFIG, PLAIN, TEXT, bpe, model_of, theirs, words, written
from tokenizers import decoders, models, normalizers, pre_tokenizers

from meshgpt.convert.gguf_tokenizer import add_tokenizer
from meshgpt.data.byte_level import ByteLevelBPE
from meshgpt.data.prepare import _identity
from meshgpt.data.special_tokens import TokenizerFiles, check_carried
from meshgpt.data.tokenizer import Tokenizer, load_tokenizer
from meshgpt.data.tokenizer_difference import difference

AS_IT_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True,
            "model_type": "bpe"}  # fmt: skip
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    "config",
    [
        FAST | {"eos_token": "<|im_end|>"},
        GPT2_CONFIG | {"eos_token": "<|im_end|>"},
        FAST | {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"},
        FAST
        | {
            "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", **PLAIN},
            "bos_token": "<|im_end|>",
            "pad_token": "!",
        },
        FAST | {"eos_token": "<|im_end|>", "added_tokens_decoder": {"300": {"content": "<tool>", "special": False}}},
    ],
)
def test_an_end_of_text_that_the_vocabulary_lacks_gets_the_id_behind_it(config: dict[str, Any], tmp_path: Path) -> None:
    folder = written(tmp_path, bpe(), tokenizer_config=config)
    found, other = load_tokenizer(folder), theirs(folder)
    assert (found.eot_id, found.vocab_size) == (other.eos_token_id, len(other))
    if "bos_token" in config:
        assert found.prefix_id == other.bos_token_id
    text = "the cat<|im_end|> sat <|im_start|>"
    assert found.encode_batch([text], parse_special=True)[0] == other(text)["input_ids"]
    assert found.eot_id not in found.encode(text)
    found.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (again.fingerprint, again.eot_id) == (found.fingerprint, found.eot_id)
    assert theirs(tmp_path / "copy").eos_token_id == found.eot_id


def test_the_same_of_vocab_and_merges_and_of_sentencepiece(tmp_path: Path) -> None:
    trained = json.loads(bpe().to_str())["model"]
    del trained["vocab"][END]
    pieces = {piece: i for i, piece in enumerate(trained["vocab"])}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in trained["merges"]]
    slow = written(tmp_path / "slow", vocab=pieces, tokenizer_config=GPT2_CONFIG | {"eos_token": "</s>"})
    (slow / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    assert load_tokenizer(slow).eot_id == theirs(slow).eos_token_id == len(pieces) + 1  # behind bos, <|endoftext|>
    model_of(tmp_path / "model", **AS_IT_IS)
    folder = written(tmp_path / "model", tokenizer_config=LLAMA | {"eos_token": "<|im_end|>"})
    found = load_tokenizer(folder)
    assert found.eot_id == found.vocab_size - 1 == theirs(folder).eos_token_id
    found.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").eot_id == found.eot_id


def test_null_in_special_tokens_map_counts(tmp_path: Path) -> None:
    folder = written(tmp_path, words(END), tokenizer_config=FAST | {"eos_token": "cat", "bos_token": "the"},
                     special_tokens_map={"eos_token": None, "bos_token": None})  # fmt: skip
    assert (theirs(folder).eos_token, theirs(folder).bos_token) == (None, None)
    found = load_tokenizer(folder)
    assert (found.eot_id, found.prefix_id) == (4, 4)  # its own <|endoftext|>


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPTNeoXTokenizerFast", "CodeGenTokenizer", *FAST.values()])
def test_a_space_in_front_is_where_transformers_puts_it(kind: str, tmp_path: Path) -> None:
    for number, (stated, config) in enumerate(itertools.product((True, False), (True, False, None))):
        backend = bpe()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=stated)
        files = {"tokenizer_class": kind} | ({} if config is None else {"add_prefix_space": config})
        folder = written(tmp_path / str(number), backend, tokenizer_config=files)
        found, other = load_tokenizer(folder), theirs(folder)
        for text in ("the cat", " the cat", "\n"):
            assert found.encode(text) == other(text)["input_ids"], (stated, config, text)
        found.save(folder / "copy")
        assert theirs(folder / "copy")("the cat")["input_ids"] == found.encode("the cat")


def test_a_class_that_would_not_read_tokenizer_json_is_not_named_in_copies(tmp_path: Path) -> None:
    """transformers 5 makes GPT-2's tokenizer of the vocabulary and the merges alone."""
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    for number, (name, part) in enumerate(
        [("pre_tokenizer", digits), ("normalizer", normalizers.NFC()), ("normalizer", None)]
    ):
        backend = bpe("<|im_end|>")
        setattr(backend, name, part)
        for kind in ("GPT2Tokenizer", "GPTNeoXTokenizer"):
            config = {"tokenizer_class": kind, "eos_token": "<|im_end|>", "padding_side": "left"}
            folder = written(tmp_path / f"{number}-{kind}", backend, tokenizer_config=config)
            found = load_tokenizer(folder)
            found.save(folder / "copy")
            check_carried(folder, folder / "copy")
            other = theirs(folder / "copy")
            for text in ("the 1234 cat", "e\u0301", TEXT[1]):
                assert found.encode(text) == other(text)["input_ids"], (name, kind, text)
            assert (other.eos_token_id, other.bos_token_id) == (found.eot_id, found.prefix_id)
            usual = (part is None) == (kind == "GPT2Tokenizer") and name != "pre_tokenizer"
            assert (json.loads((folder / "copy/tokenizer_config.json").read_text())["tokenizer_class"] == kind) == usual


def test_sentencepiece_without_its_prefix(tmp_path: Path) -> None:
    model = model_of(tmp_path, **AS_IT_IS)
    folder = written(tmp_path, tokenizer_config=LLAMA | {"add_prefix_space": False})
    found = load_tokenizer(folder)
    assert found.encode("the cat") == theirs(folder)("the cat", add_special_tokens=False)["input_ids"]
    assert found.decode(found.encode("the cat")) == "the cat"
    found.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.model").read_bytes() == model
    again = load_tokenizer(tmp_path / "copy")
    assert (again.fingerprint, again.encode("the cat")) == (found.fingerprint, found.encode("the cat"))


def test_sentencepiece_begins_texts_with_its_own_piece(tmp_path: Path) -> None:
    model_of(tmp_path, **AS_IT_IS)
    processor = sp.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert load_tokenizer(tmp_path).prefix_id == processor.bos_id() == 1
    written(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    assert load_tokenizer(tmp_path).prefix_id == theirs(tmp_path).bos_token_id == 1
    written(tmp_path, tokenizer_config={"tokenizer_class": "LlamaTokenizer", "bos_token": None})
    assert load_tokenizer(tmp_path).prefix_id == 2  # the end


@pytest.mark.parametrize(
    "named",
    [
        {"tokenizer_config": LLAMA | {"additional_special_tokens": ["<|im_end|>"]}},
        {"tokenizer_config": LLAMA | {"extra_special_tokens": {"im": "<|im_end|>"}}},
        {"tokenizer_config": LLAMA | {"eos_token": None}, "generation_config": {"eos_token_id": -1}},
    ],
)
def test_sentencepiece_never_finds_an_added_token_that_is_special(named: dict[str, Any], tmp_path: Path) -> None:
    model_of(tmp_path, **AS_IT_IS)
    pieces = sp.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).vocab_size()
    if "generation_config" in named:
        named = named | {"generation_config": {"eos_token_id": pieces}}
    folder = written(tmp_path, added_tokens={"<|im_end|>": pieces, "<x>": pieces + 1}, **named)
    found, text = load_tokenizer(folder), "a<|im_end|><x> <|im_end|>"
    assert pieces not in found.encode(text)
    assert found.encode(text).count(pieces + 1) == 1
    assert found.decode(found.encode(text)) == text
    assert found.encode_batch([text], parse_special=True)[0].count(pieces) == 2


_FOLDERS: dict[str, Tokenizer] = {}


def symbols(tmp_path_factory: pytest.TempPathFactory, end: str, **settings: Any) -> Tokenizer:
    """Of sentencepiece, with ends of text that the model itself finds, and added tokens."""
    if end not in _FOLDERS:
        folder = tmp_path_factory.mktemp("symbols")
        model_of(folder, user_defined_symbols=["\n\n", "<><>"], **{**AS_IT_IS, **settings})
        pieces = sp.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
        config = LLAMA | {"eos_token": end, "additional_special_tokens": ["<><>", "\n\n"]}
        written(folder, tokenizer_config=config, added_tokens={"<x>": pieces, "<y>": pieces + 1})
        _FOLDERS[end] = load_tokenizer(folder)
    return _FOLDERS[end]


PARTS = st.lists(st.sampled_from(["\n", "\n\n", "<>", "<><>", "<", "a", " ", "  ", "<x>", "<y>", "é", "the cat"]))


@pytest.mark.parametrize("end", ["\n\n", "<><>"])
@given(parts=PARTS, cut=st.integers(0, 30))
@settings(deadline=None, max_examples=150)
def test_markers_that_overlap_lose_nothing(
    end: str, parts: list[str], cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    found = symbols(tmp_path_factory, end)
    text = "".join(parts)
    ids = found.encode(text)
    special = {found._id_of(token) for token in ("\n\n", "<><>", "<s>")}
    assert special.isdisjoint(ids)
    assert found.decode(ids) == text
    assert found.loss(text, ids) == type(found.loss("", []))()
    head, tail = text[:cut], text[cut:]
    if head and tail and not any(head.endswith(part[:n]) and tail.startswith(part[n:]) for part in ("<x>", "<y>")
                                 for n in (1, 2)):  # fmt: skip
        (rest,) = found.encode_batch([tail], continued=True)
        assert found.decode([*found.encode(head), *rest]) == text
        assert found.loss(tail, rest, continued=True).characters == 0


def odd() -> dict[str, tokenizers.Tokenizer]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = {letter: i for i, letter in enumerate(alphabet)} | {END: 256}

    def of(model: Any, **parts: Any) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer(model)
        parts = {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False),
                 "decoder": decoders.ByteLevel()} | parts  # fmt: skip
        for name, part in parts.items():
            setattr(backend, name, part)
        backend.add_special_tokens([END])
        return backend

    bert = {piece: i for i, piece in enumerate(["[UNK]", END, "a", "b", ",", "##a"])}
    added = bpe()
    added.add_tokens(["é", "ß", "日本", "<x>"])
    return {
        "added tokens in letters that stand for bytes": added,
        "a prefix of parts of words": of(models.BPE(pieces | {"##a": 257}, [], continuing_subword_prefix="##")),
        "an ending of words": of(models.BPE(pieces | {"a</w>": 257}, [], end_of_word_suffix="</w>")),
        "word pieces": of(models.WordPiece(bert, unk_token="[UNK]"), normalizer=normalizers.BertNormalizer(),
                          pre_tokenizer=pre_tokenizers.BertPreTokenizer(), decoder=decoders.WordPiece()),
        "whole words": words(END),
        "lower case": of(models.BPE(pieces, []), normalizer=normalizers.Lowercase()),
        "usual": bpe(),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "backend"), odd().items(), ids=odd())
def test_a_loss_is_told_wherever_a_text_does_not_come_back(
    name: str, backend: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    found = load_tokenizer(written(tmp_path, backend))
    told = []
    for text in ("a b", "a,b  a", "a\nb", "café Straße", "日本", "<x> abc", "A", "the  cat", "", " "):
        ids = found.encode(text)
        loss = found.loss(text, ids)
        told.append(loss.characters > 0)
        assert told[-1] == (found.decode(ids) != text), text
    assert any(told) == (name != "usual")


def test_sentencepiece_tells_its_losses_too(tmp_path: Path) -> None:
    for number, changed in enumerate(({"treat_whitespace_as_suffix": True}, {"remove_extra_whitespaces": True}, {})):
        model_of(tmp_path / str(number), **AS_IT_IS | changed)
        found = load_tokenizer(tmp_path / str(number))
        for text in ("the cat", " the cat", "the  cat ", "the\tcat\n", "", " ", "\u2581"):
            ids = found.encode(text)
            assert (found.loss(text, ids).characters > 0) == (found.decode(ids) != text), (changed, text)


def test_what_is_special_in_one_folder_alone_makes_a_difference(tmp_path: Path) -> None:
    backend = bpe("<|im_end|>", special=False)
    plain = load_tokenizer(written(tmp_path / "plain", backend, tokenizer_config=GPT2_CONFIG))
    files = {"tokenizer_config": GPT2_CONFIG, "special_tokens_map": {"additional_special_tokens": ["<|im_end|>"]}}
    special = load_tokenizer(written(tmp_path / "special", backend, **files))
    text = "cat <|im_end|> sat"
    assert plain.fingerprint == special.fingerprint
    assert plain.encode(text) != special.encode(text)
    assert difference(plain, special) == difference(special, plain) == "only one of them finds '<|im_end|>' in text"
    assert _identity(plain) == plain.fingerprint != _identity(special)
    pair = []
    for flag in (True, False):
        folder = tmp_path / str(flag)
        model_of(folder, **AS_IT_IS)
        pieces = sp.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
        decoder = {str(pieces): {"content": "<|im_end|>", "special": flag}}
        pair.append(load_tokenizer(written(folder, tokenizer_config=LLAMA | {"added_tokens_decoder": decoder})))
    assert pair[0].encode(text) != pair[1].encode(text)
    assert difference(*pair)
    assert _identity(pair[0]) != _identity(pair[1])


@pytest.mark.parametrize("content", ['{"x": "\\ud800", "y": "日本"}', '{"x": NaN, "y": [1, Infinity]}'])
def test_what_json_can_hardly_say_is_carried(content: str, tmp_path: Path) -> None:
    folder = written(tmp_path, bpe())
    (folder / "tokenizer_config.json").write_text(content)
    load_tokenizer(folder).save(tmp_path / "copy")
    check_carried(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer_config.json").write_text('{"x": 1, "y": 2}')
    with pytest.raises(Exception, match="does not carry 'x'"):
        check_carried(folder, tmp_path / "copy")


def test_gguf_has_the_padding_and_all_chat_templates(tmp_path: Path) -> None:
    import gguf

    templates = [{"name": name, "template": f"{name}!"} for name in ("tool use", "default", "rag")]
    config = FAST | {"eos_token": END, "pad_token": "<pad>", "chat_template": templates}
    found = load_tokenizer(written(tmp_path, bpe("<pad>"), tokenizer_config=config))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    add_tokenizer(gguf, writer, found, 310)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    fields = {key: field.contents() for key, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    theirs_ = gguf.SpecialVocab(tmp_path)
    assert fields["tokenizer.ggml.padding_token_id"] == theirs_.special_token_ids["pad"] == 300
    assert fields["tokenizer.chat_template"] == "default!"
    assert fields["tokenizer.chat_template.tool_use"] == "tool use!"
    assert sorted(fields["tokenizer.chat_templates"]) == ["rag", "tool_use"]
    again = dataclasses.replace(TokenizerFiles.read(tmp_path), templates={"chat_template.jinja": "of its own file"})
    assert again.chat_templates()["default"] == "of its own file"
    assert isinstance(found, ByteLevelBPE)
