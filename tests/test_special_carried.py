"""Special ids and chat templates through import, export, quantization and GGUF, against transformers and `gguf`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import hf_peers
import pytest
import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers

from meshgpt import api, cli
from meshgpt.data import special_tokens
from meshgpt.data.special_tokens import TokenizerFiles
from meshgpt.data.tokenizer import train_bpe
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig

TEXT = Path(dataclasses.__file__).read_text()
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>\n{% endfor %}"
PROMPTS = ["def f(self):", "import ", "class A:\n"]
MODELS = {
    "gptj": GPTJConfig(vocab_size=310, n_positions=64, n_layers=2, n_heads=2, d_model=64, rotary_dim=8),
    "gpt2": GPT2Config(vocab_size=310, n_positions=64, n_layers=2, n_heads=2, d_model=64),
}
END, OTHER = 300, 301  # <|im_end|>, <|im_start|>


def backend() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(train_bpe([TEXT], 300).to_json())
    made.add_special_tokens([tokenizers.AddedToken("<|im_end|>", normalized=False)])
    made.add_tokens([tokenizers.AddedToken("<|im_start|>", normalized=False), tokenizers.AddedToken("<tool>")])
    made.add_special_tokens([tokenizers.AddedToken("<|no role|>", normalized=False)])
    return made


def fine_tuned(family: str, folder: Path) -> Path:
    """A chat model whose end of text is not <|endoftext|>, which it has too; greedy texts meet all that end them."""
    model = hf_peers.peer(MODELS[family])
    folder.mkdir(parents=True)
    backend().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>",
              "pad_token": "<|endoftext|>", "padding_side": "left", "model_max_length": 64}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    free = [greedy(model, tokenizer, prompt, []) for prompt in PROMPTS]
    model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id = END, OTHER, 0
    # What the first two prompts are continued with ends them, the third goes on to <|im_end|> or its length.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[END, free[0][3], free[1][5]], bos_token_id=OTHER, pad_token_id=0
    )
    model.save_pretrained(folder)
    return folder


def greedy(model: Any, tokenizer: Any, prompt: str, ends: list[int] | None) -> list[int]:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    flags = {} if ends is None else {"eos_token_id": ends or None}
    with torch.no_grad():
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, **flags)
    return found[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: fine_tuned(family, tmp_path_factory.mktemp("chat") / family) for family in MODELS}


def command(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


def carried(source: Path, copy: Path) -> None:
    """What transformers reads of both."""
    names = ("special_tokens_map", "chat_template", "padding_side", "model_max_length", "eos_token_id", "bos_token_id",
             "pad_token_id")  # fmt: skip
    read = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (source, copy)]
    before, after = ({name: getattr(one, name) for name in names} for one in read)
    assert after == before
    generation = [transformers.GenerationConfig.from_pretrained(folder).to_diff_dict() for folder in (source, copy)]
    assert generation[0] == generation[1]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, copy)]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert configs[1][name] == configs[0][name]


@pytest.mark.parametrize("family", MODELS)
def test_a_chat_model_stops_where_transformers_does_and_keeps_doing_so(
    family: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[family]
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    stops = set(model.generation_config.eos_token_id)
    expected = []
    for prompt in PROMPTS:
        ids = greedy(model, tokenizer, prompt, None)
        expected.append(tokenizer.decode(ids[:-1] if ids[-1] in stops else ids))
    imported, exported, few = (tmp_path / name for name in ("imported", "exported", "few"))
    command("import", source, "--out", imported)
    command("export", imported, "--out", exported)
    carried(source, exported)
    command("quantize", imported, "--format", "nf4", "--out", few)
    carried(source, few)
    for folder in (source, imported, exported):
        lm = api.load(folder)
        assert lm.tokenizer.stop_ids == stops
        assert lm.generate(PROMPTS, 12, temperature=0) == expected
    # An empty prompt begins as the folder says, and a marker in a prompt is text unless that is asked for.
    assert lm.generate("", 4, temperature=0) == lm.generate("<|im_start|>", 4, temperature=0, parse_special=True)
    asked = [lm.generate("<|im_end|>", 4, temperature=0, parse_special=parse) for parse in (False, True)]
    plain = tokenizer.decode(greedy(model, tokenizer, "<|im_end|>", None)[:4])
    assert plain.startswith(asked[1][0])
    assert asked[0] != asked[1]


def test_an_export_that_drops_something_does_not_get_its_name(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command("import", sources["gpt2"], "--out", tmp_path / "imported")
    write = TokenizerFiles.write

    def forgetful(self: TokenizerFiles, folder: Path, **rest: Any) -> None:
        write(dataclasses.replace(self, templates={}), folder, **rest)

    monkeypatch.setattr(special_tokens.TokenizerFiles, "write", forgetful)
    for words in (("export", tmp_path / "imported"), ("quantize", tmp_path / "imported", "--format", "int8")):
        assert cli.main([*map(str, words), "--out", str(tmp_path / "out")]) == 2
        assert "is not the chat template of" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out").exists()


def test_a_gguf_file_says_the_same(sources: dict[str, Path], tmp_path: Path) -> None:
    command("quantize", sources["gpt2"], "--format", "gguf-q8_0", "--out", tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    assert ids == {"bos": OTHER, "eos": END, "padding": 0}
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == TEMPLATE
    kinds = fields["tokenizer.ggml.token_type"]
    assert [kinds[i] for i in (0, 1, END, OTHER, 302, 303)] == [
        gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL,
        gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL,
    ]  # fmt: skip
    assert fields["tokenizer.ggml.pre"] == "gpt-2"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "add_prefix_space"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)}, "use_regex"),
        ({"normalizer": tokenizers.normalizers.NFC()}, "normalizer NFC"),
        ({"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)])},
         "individual_digits"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(
    change: dict[str, Any], said: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for path in sources["gpt2"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    made = backend()
    for name, value in change.items():
        setattr(made, name, value)
    made.save(str(folder / "tokenizer.json"))
    assert cli.main(["quantize", str(folder), "--format", "gguf-q8_0", "--out", str(tmp_path / "out")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "llama.cpp would give other ids" in told
    assert said in told


def test_single_digits_have_a_name_in_llama_cpp(sources: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    for path in sources["gpt2"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    made = backend()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])  # type: ignore[assignment]
    made.save(str(folder / "tokenizer.json"))
    command("quantize", folder, "--format", "gguf-q8_0", "--out", tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "model-q8_0.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "starcoder"
