"""What the files beside a tokenizer state, against transformers; and text that looks like special tokens."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece as sp
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from meshgpt.data.blocks import cut_point
from meshgpt.data.special_tokens import check_carried
from meshgpt.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from meshgpt.errors import UserError

END = "<|endoftext|>"
TEXT = ["the cat sat on the mat, and None of them sat on a hat.\n" * 4, "def f(x):\n    return x  # 12 345\n" * 4]
GPT2_CONFIG = {"tokenizer_class": "GPT2Tokenizer"}


def written(folder: Path, backend: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
    """A folder with a tokenizer.json and files of JSON; a name is that of the file without its ending."""
    folder.mkdir(exist_ok=True)
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def words(*more: str) -> tokenizers.Tokenizer:
    """A tokenizer of whole words."""
    listed = ["<unk>", "None", "the", "cat", *more]
    backend = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(listed)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def bpe(*added: str, special: bool = True) -> tokenizers.Tokenizer:
    """GPT-2's kind, with tokens added behind its vocabulary."""
    backend = tokenizers.Tokenizer.from_str(train_bpe(TEXT, 300).to_json())
    tokens = [tokenizers.AddedToken(token, special=special, normalized=False) for token in added]
    (backend.add_special_tokens if special else backend.add_tokens)(tokens)
    return backend


PLAIN = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
STATES: dict[str, dict[str, Any]] = {
    "special_tokens_map alone": {"tokenizer_config": FAST, "special_tokens_map": {"eos_token": "</s>"}},
    "null in the config": {"tokenizer_config": FAST | {"eos_token": None}, "special_tokens_map": {"eos_token": "</s>"}},
    "as objects": {"tokenizer_config": FAST | {"bos_token": {"__type": "AddedToken", "content": "cat", **PLAIN}},
                   "special_tokens_map": {"eos_token": {"content": "</s>", **PLAIN}}},
    "the map before the config": {"tokenizer_config": FAST | {"eos_token": "cat"},
                                  "special_tokens_map": {"eos_token": "</s>", "bos_token": "the"}},
    "the config before the map": {"tokenizer_config": FAST | {"eos_token": "</s>", "added_tokens_decoder": {}},
                                  "special_tokens_map": {"eos_token": "cat"}},
}  # fmt: skip


@pytest.mark.parametrize("files", STATES.values(), ids=STATES)
def test_the_end_of_text_is_the_one_that_transformers_reads(files: dict[str, Any], tmp_path: Path) -> None:
    folder = written(tmp_path, words("</s>"), **files)
    found, other = load_tokenizer(folder), theirs(folder)
    assert found.eot_id == other.eos_token_id == 4
    assert found.prefix_id == (4 if other.bos_token_id is None else other.bos_token_id)
    found.save(tmp_path / "copy")
    check_carried(folder, tmp_path / "copy")
    assert theirs(tmp_path / "copy").special_tokens_map == other.special_tokens_map
    assert load_tokenizer(tmp_path / "copy").eot_id == 4


def test_nothing_ends_texts_with_the_word_none(tmp_path: Path) -> None:
    folder = written(tmp_path, words(), tokenizer_config=FAST | {"eos_token": None})
    with pytest.raises(UserError, match=r"no token that ends a text: name one of its tokens as `eos_token`"):
        load_tokenizer(folder)
    written(folder, config={"eos_token_id": 3})
    assert load_tokenizer(folder).eot_id == 3
    written(folder, tokenizer_config=FAST | {"eos_token": "<end>"}, config={})
    assert load_tokenizer(folder).eot_id == 4  # behind the vocabulary, as in transformers
    (folder / "tokenizer_config.json").write_text("{ broken")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not JSON .*: mend it, or remove it"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("model", "generation", "stops"),
    [
        ({}, None, {1}),
        ({"eos_token_id": 0}, None, {0, 1}),
        ({"eos_token_id": 0}, {"eos_token_id": [301, 1]}, {1, 301}),
        ({"eos_token_id": [301]}, {"max_length": 9}, {1, 301}),
        ({"eos_token_id": 50256}, {"eos_token_id": [50256, True, None]}, {1}),
    ],
)
def test_generated_texts_end_where_the_files_say(
    model: dict[str, Any], generation: dict[str, Any] | None, stops: set[int], tmp_path: Path
) -> None:
    backend = bpe("<|im_end|>", "<|im_start|>")
    config = {**GPT2_CONFIG, "eos_token": "!", "bos_token": "<|im_start|>"}
    files = {"config": model, "tokenizer_config": config} | ({"generation_config": generation} if generation else {})
    found = load_tokenizer(written(tmp_path, backend, **files))
    assert (found.eot_id, found.prefix_id) == (1, 301)
    assert found.stop_ids == stops
    found.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert (again.stop_ids, again.stated.ids, again.ending) == (stops, model, "documents end with id 1")
    assert again.fingerprint == found.fingerprint


def test_a_slow_tokenizer_keeps_its_added_tokens(tmp_path: Path) -> None:
    trained = json.loads(bpe().to_str())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in trained["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    config = {**GPT2_CONFIG, "eos_token": "<|im_end|>", "bos_token": "<|im_end|>", "unk_token": "<|im_end|>"}
    folder = written(tmp_path, vocab=trained["vocab"], added_tokens={"<|im_end|>": 301, "<tool>": 300},
                     tokenizer_config=config)  # fmt: skip
    found, other = load_tokenizer(folder), theirs(folder)
    assert (found.eot_id, found.vocab_size) == (301, 302) == (other.eos_token_id, len(other))
    text = "the cat <tool> sat"
    assert found.encode(text) == other(text)["input_ids"]
    assert found.decode([300, 301]) == "<tool><|im_end|>" == other.decode([300, 301])
    found.save(tmp_path / "copy")
    assert theirs(tmp_path / "copy")(text)["input_ids"] == found.encode(text)
    assert load_tokenizer(tmp_path / "copy").fingerprint == found.fingerprint
    # Ids with a hole, as after a vocabulary that was padded.
    written(folder, added_tokens={"<tool>": 310})
    assert load_tokenizer(folder).encode("<tool>") == [310]
    written(folder, added_tokens={"<tool>": 3})
    with pytest.raises(UserError, match=r"'<tool>' has the id 3, which is that of"):
        load_tokenizer(folder)


def model_of(folder: Path, **settings: Any) -> bytes:
    """A small sentencepiece model."""
    model = io.BytesIO()
    sp.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXT for line in text.splitlines()]), model_writer=model,
        vocab_size=330, minloglevel=2, hard_vocab_limit=False, **settings,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return model.getvalue()


def test_a_tokenizer_json_beside_another_model_is_taken(tmp_path: Path) -> None:
    model_of(tmp_path)
    written(tmp_path, bpe("<|im_end|>"), tokenizer_config={**GPT2_CONFIG, "eos_token": "<|im_end|>"})
    found = load_tokenizer(tmp_path)
    assert found.eot_id == theirs(tmp_path).eos_token_id
    assert found.encode(TEXT[0]) == theirs(tmp_path)(TEXT[0])["input_ids"]


def test_a_sentencepiece_model_has_the_tokens_of_its_folder(tmp_path: Path) -> None:
    model_of(tmp_path, byte_fallback=True)
    pieces = sp.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model")).vocab_size()
    written(tmp_path, added_tokens={"<pad>": pieces, "<|im_end|>": pieces + 1}, generation_config={"eos_token_id": 2},
            special_tokens_map={"eos_token": "<|im_end|>", "pad_token": "<pad>", "bos_token": "<s>"})  # fmt: skip
    found = load_tokenizer(tmp_path)
    assert (found.eot_id, found.prefix_id, found.vocab_size) == (pieces + 1, 1, pieces + 2)
    assert found.stop_ids == {2, pieces + 1}
    text = "the cat<|im_end|>sat </s>"
    assert {found.eot_id, 1, 2}.isdisjoint(found.encode(text))
    assert found.decode(found.encode(text)) == text
    (ids,) = found.encode_batch([text], parse_special=True)
    assert (ids.count(found.eot_id), ids.count(2)) == (1, 0)  # </s> is no token that the files name
    assert found.decode(ids) == text
    found.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").fingerprint == found.fingerprint
    written(tmp_path, added_tokens={"<|im_end|>": 5})
    with pytest.raises(UserError, match="the id 5, which is one of theirs"):
        load_tokenizer(tmp_path)


def unigram() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>",
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz<>/|_ "), show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(TEXT, trainer)
    described = json.loads(backend.to_str())
    described["added_tokens"] = []  # the model alone finds them now
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def ignoring_merges() -> tokenizers.Tokenizer:
    described = json.loads(bpe().to_str())
    described["model"]["ignore_merges"], described["added_tokens"] = True, []
    described["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                                  "use_regex": False}  # fmt: skip
    return tokenizers.Tokenizer.from_str(json.dumps(described))


LITERAL: dict[str, tuple[tokenizers.Tokenizer, str, str]] = {
    "an added token that is not special": (bpe("<|im_end|>", special=False), "<|im_end|>", "cat <|im_end|> sat"),
    "a special added token": (bpe("<|im_end|>"), "<|im_end|>", "cat<|im_end|>sat<|im_end|>"),
    "unigram": (unigram(), "</s>", "the cat</s>sat on </s></s> a mat"),
    "whole words": (words("</s>"), "</s>", "the </s> cat"),
    "merges ignored": (ignoring_merges(), END, END),
}


@pytest.mark.parametrize(("backend", "end", "text"), LITERAL.values(), ids=LITERAL)
def test_text_never_becomes_a_special_id_unless_asked(
    backend: tokenizers.Tokenizer, end: str, text: str, tmp_path: Path
) -> None:
    found = load_tokenizer(written(tmp_path, backend, tokenizer_config=FAST | {"eos_token": end, "unk_token": "<unk>"}))
    assert end in text
    for continued in (False, True):
        assert found.eot_id not in found.encode_batch([text], continued=continued)[0]
    if not isinstance(backend.model, models.WordLevel):  # which does not give spaces back
        assert found.decode(found.encode(text)) == text
    (ids,) = found.encode_batch([text], parse_special=True)
    assert ids.count(found.eot_id) == text.count(end)
    assert ids == theirs(tmp_path)(text)["input_ids"]


def test_what_is_unknown_is_not_the_end_of_text(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={END: 0, "a": 1, "b": 2}, merges=[], unk_token=END))
    found = load_tokenizer(written(tmp_path, backend, tokenizer_config=GPT2_CONFIG))
    assert backend.encode("azb").ids == [1, 0, 2]
    assert found.encode("azb") == [1, 2]
    loss = found.loss("azb", [1, 2])
    assert (loss.unknown, loss.characters) == (0, 1)


def prefixed(normalizer: Any = None, pre_tokenizer: Any = None, decoder: Any = None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer  # type: ignore[assignment]
    backend.decoder = decoder
    names = ["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=names, show_progress=False))
    described = json.loads(backend.to_str())
    described["added_tokens"] = [one for one in described["added_tokens"] if one["content"] == "</s>"]
    return tokenizers.Tokenizer.from_str(json.dumps(described))


def byte_prefixed() -> tokenizers.Tokenizer:
    backend = bpe("</s>")
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    return backend


def _spaces() -> Any:
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


PREFIXED = {
    "Prepend": prefixed(
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]), None, _spaces()
    ),
    "Metaspace": prefixed(
        None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]),
    ),
    "add_prefix_space": byte_prefixed(),
}  # fmt: skip
ANY_TEXT = st.text(st.sampled_from("ab \n\tz.é東<|>"), min_size=1, max_size=200)


def tokenizer_with_prefix(kind: str, folder: Path) -> Tokenizer:
    if kind == "sentencepiece":
        model_of(folder, byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False)
        return load_tokenizer(folder)
    return load_tokenizer(written(folder, PREFIXED[kind], tokenizer_config=FAST | {"eos_token": "</s>"}))


@pytest.mark.parametrize("kind", [*PREFIXED, "sentencepiece"])
def test_a_long_document_has_no_seams(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cut where `prepare` cuts long documents, at blocks of a few bytes, it comes back whole."""
    tokenizer = tokenizer_with_prefix(kind, tmp_path_factory.mktemp("seams"))

    @settings(max_examples=60, deadline=None)
    @given(text=ANY_TEXT, block=st.integers(8, 60))
    def comes_back(text: str, block: int) -> None:
        rest, ids, begun = text.encode(), [], False
        while rest:
            cut = cut_point(rest[:block]) if len(rest) > block else len(rest)
            ids += tokenizer.encode_batch([rest[:cut].decode()], continued=begun)[0]
            rest, begun = rest[cut:], True
        whole = tokenizer.decode(tokenizer.encode(text))
        assert tokenizer.decode(ids) == whole
        if kind == "add_prefix_space":
            assert whole == " " + text.removeprefix(" ")
        elif kind != "Metaspace" or not text.startswith(" "):  # it takes a space in front for the one it puts there
            assert whole == text

    comes_back()
    if kind == "Prepend":
        assert tokenizer.encode_batch([" a"], continued=True) != tokenizer.encode_batch([" a"])


def test_what_a_copy_does_not_carry_is_told(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}\u2028{% endfor %}\r\n"
    source = written(
        tmp_path / "source", bpe("<|im_end|>"), config={"eos_token_id": 300, "pad_token_id": None},
        generation_config={"eos_token_id": [300, 0], "temperature": 0.7},
        tokenizer_config={**GPT2_CONFIG, "eos_token": "<|im_end|>", "padding_side": "left", "model_max_length": 10**30},
    )  # fmt: skip
    (source / "chat_template.jinja").write_bytes(template.encode())
    copy = tmp_path / "copy"

    def fresh() -> Path:
        load_tokenizer(source).save(copy)
        check_carried(source, copy)
        return copy

    assert (fresh() / "chat_template.jinja").read_bytes() == template.encode()
    assert theirs(copy).model_max_length == 10**30
    for name, key in (("tokenizer_config", "padding_side"), ("generation_config", "eos_token_id"),
                      ("special_ids", "pad_token_id")):  # fmt: skip
        path = fresh() / f"{name}.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
        with pytest.raises(UserError, match=key):
            check_carried(source, copy)
    (fresh() / "chat_template.jinja").write_text("other")
    with pytest.raises(UserError, match="is not the chat template"):
        check_carried(source, copy)
