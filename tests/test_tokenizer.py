"""Tokenizers against transformers, the tokenizers library and the text itself."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshgpt.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe, train_sentencepiece
from meshgpt.errors import UserError

STDLIB = Path(sysconfig.get_path("stdlib"))
TEXTS = [path.read_text(encoding="utf-8") for path in sorted((STDLIB / "asyncio").glob("*.py"))]
PROSE = "Größe 東京 🙂\n\n\tdef f():\r\n        return  'x'  \n"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS, 1000)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return train_sentencepiece(TEXTS, 1000)


@pytest.fixture(params=["bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_text_comes_back(tokenizer: Tokenizer):
    for text in [*TEXTS, PROSE, "", " ", "\0"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.vocab_size == 1000


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_from_bpe(bpe: Tokenizer, text: str):
    assert bpe.decode(bpe.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_but_its_space_sign_comes_back_from_sentencepiece(sentencepiece: Tokenizer, text: str):
    assert sentencepiece.decode(sentencepiece.encode(text)) == text


def test_batch_equals_one_by_one(tokenizer: Tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_a_document_cannot_inject_the_end_of_text(tokenizer: Tokenizer, tmp_path: Path):
    text = f"before {END_OF_TEXT} after"
    tokenizer.save(tmp_path)
    for one in (tokenizer, load_tokenizer(tmp_path)):
        ids = one.encode(text)
        assert one.eot_id not in ids
        assert one.decode(ids) == text
        assert one.decode([*one.encode("a"), one.eot_id, *one.encode("b")]) == f"a{END_OF_TEXT}b"


def test_saved_folder_serves_us_and_transformers(tokenizer: Tokenizer, tmp_path: Path):
    from transformers import AutoTokenizer

    tokenizer.save(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.fingerprint == tokenizer.fingerprint
    assert (len(theirs), theirs.eos_token_id) == (tokenizer.vocab_size, tokenizer.eot_id)
    for text in [*TEXTS, PROSE]:
        ids = tokenizer.encode(text)
        assert ours.encode(text) == ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_vocab_and_merges_are_the_same_tokenizer(bpe: Tokenizer, tmp_path: Path):
    bpe.save(tmp_path / "json")
    model = json.loads((tmp_path / "json" / "tokenizer.json").read_text())["model"]
    gpt2 = tmp_path / "gpt2"
    gpt2.mkdir()
    (gpt2 / "vocab.json").write_text(json.dumps(model["vocab"]))
    (gpt2 / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in model["merges"])
    )
    for path in (gpt2, gpt2 / "vocab.json", gpt2 / "merges.txt"):
        loaded = load_tokenizer(path)
        assert loaded.eot_id == bpe.eot_id
        assert loaded.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_training_does_not_depend_on_threads(kind: str, tokenizer: Tokenizer, request: pytest.FixtureRequest):
    code = (
        "import sys\nfrom pathlib import Path\n"
        f"from meshgpt.data.tokenizer import train_{kind} as train\n"
        "texts = [p.read_text(encoding='utf-8') for p in sorted(Path(sys.argv[1]).glob('*.py'))]\n"
        "print(train(texts, 1000).fingerprint)"
    )
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    arguments = [sys.executable, "-c", code, str(STDLIB / "asyncio")]
    other = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == request.getfixturevalue(kind).fingerprint


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_an_ordinary_sentencepiece_model_loads(kind: str, tmp_path: Path):
    import io

    import sentencepiece as library

    model = io.BytesIO()
    lines = [line for text in TEXTS for line in text.split("\n") if line]
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=500, model_type=kind, minloglevel=2
    )
    path = tmp_path / "spm.model"
    path.write_bytes(model.getvalue())
    ours = load_tokenizer(path)
    theirs = library.SentencePieceProcessor(model_proto=model.getvalue())
    assert ours.eot_id == theirs.eos_id()
    assert ours.encode_batch(TEXTS) == theirs.encode(TEXTS)
    # A text cut before a space has the tokens of the whole, although such a model puts a space in front of any text.
    [continued] = ours.encode_batch([" of the future"], continued=True)
    assert ours.encode("return the value") + continued == ours.encode("return the value of the future")
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    assert not (tmp_path / "saved" / "tokenizer.json").exists()


def test_bad_files_are_named(tmp_path: Path, bpe: Tokenizer):
    with pytest.raises(UserError, match=r"no tokenizer at .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "bad.model"):
        (tmp_path / name).write_text("{ this is neither")
        with pytest.raises(UserError, match=name):
            load_tokenizer(tmp_path / name)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"merges\.txt is missing"):
        load_tokenizer(tmp_path / "vocab.json")
    bpe.save(tmp_path / "saved")
    content = (tmp_path / "saved" / "tokenizer.json").read_text().replace("endoftext", "renamed")
    (tmp_path / "saved" / "tokenizer.json").write_text(content)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "saved" / name).unlink()
    with pytest.raises(UserError, match="has no token that ends a text"):
        load_tokenizer(tmp_path / "saved")


def test_vocabularies_that_cannot_be(tmp_path: Path):
    with pytest.raises(UserError, match="vocab_size 256 is too small"):
        train_bpe(TEXTS, 256)
    with pytest.raises(UserError, match="vocab_size 10 "):
        train_sentencepiece(TEXTS, 10)
