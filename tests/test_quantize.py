"""`meshgpt quantize` against transformers with bitsandbytes: the same bytes, the same logits, clear refusals."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import hf_peers
import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import transformers

from meshgpt import cli, convert
from meshgpt.convert.bitsandbytes_write import BnbForm
from meshgpt.data.tokenizer import train_bpe
from meshgpt.distributed.mesh import MeshShape, make_mesh, spec
from meshgpt.models.gpt2 import GPT2Config
from meshgpt.models.gptj import GPTJConfig
from meshgpt.models.model import Model
from meshgpt.models.precision import Precision

VOCAB = 320
GPT2 = GPT2Config(vocab_size=VOCAB, n_positions=64, n_layers=2, n_heads=4, d_model=64, vocab_multiple=128)
GPTJ = GPTJConfig(vocab_size=VOCAB, n_positions=64, n_layers=2, n_heads=4, d_model=64, rotary_dim=8, vocab_multiple=128)
CONFIGS = {"gpt2": GPT2, "gptj": GPTJ}
TEXT = Path(os.__file__).read_text(encoding="utf-8")
TOKENS_BT = np.random.default_rng(0).integers(0, VOCAB, (8, 24), dtype=np.int32)
MESHES = [MeshShape(data=8), MeshShape(data=2, fsdp=2, tensor=2), MeshShape(data=1, fsdp=4, tensor=2)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of transformers for each family, tokenizer included."""
    folder, tokenizer = tmp_path_factory.mktemp("sources"), train_bpe([TEXT], VOCAB)
    for name, config in CONFIGS.items():
        hf_peers.peer(config).save_pretrained(folder / name)
        tokenizer.save(folder / name)
    return {name: folder / name for name in CONFIGS}


def quantized(source: Path, out: Path, *flags: str) -> Path:
    assert cli.main(["quantize", str(source), "--out", str(out), "--dtype", "float32", *flags]) == 0
    return out


def refused(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> str:
    """Asserts that nothing was left at `out` or beside it; gives what was said."""
    capsys.readouterr()
    assert cli.main(["quantize", *arguments, "--out", str(out)]) == 2
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    return capsys.readouterr().err


def our_logits(folder: Path, mesh: MeshShape, tokens_BT: np.ndarray = TOKENS_BT) -> np.ndarray:
    """The logits of what `hf.load` finds, in float32."""
    with jax.set_mesh(make_mesh(mesh)):
        model = Model(config=convert.read_config(folder), precision=Precision(compute="float32"))
        params = convert.load(folder, model.config, model.abstract_params())
        found = _logits(model, params, jax.device_put(tokens_BT, spec("batch seq")))
        return np.asarray(found)[..., : model.config.vocab_size]


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Model, params: dict, tokens_BT: jax.Array) -> jax.Array:
    decoder = model.bind(params)
    return decoder.logits(decoder.hidden(tokens_BT))


def spread_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(a - b))) / np.std(b))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("flags", [("nf4",), ("fp4", "--double-quant"), ("int8",)], ids=lambda flags: flags[0])
def test_transformers_loads_it_and_both_compute_the_same(
    family: str, flags: tuple[str, ...], sources: dict[str, Path], tmp_path: Path
) -> None:
    out = quantized(sources[family], tmp_path / "out", "--format", *flags)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, told = load(out, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    ours = our_logits(out, MESHES[0])
    for mesh in MESHES[1:] * (flags[0] == "nf4"):
        np.testing.assert_allclose(our_logits(out, mesh), ours, atol=2e-4)
    # Its kernels round activations to bfloat16, or int8: a percent of the logits' spread and no more.
    assert spread_error(hf_peers.torch_logits(model, TOKENS_BT), ours) < (0.05 if flags[0] == "int8" else 0.02)
    # Dequantized by bitsandbytes, the same weights leave nothing but the order of sums.
    dequantized = hf_peers.torch_logits(load(out).dequantize(torch.float32), TOKENS_BT)
    np.testing.assert_allclose(ours, dequantized, atol=5e-4 if flags[0] != "int8" else 5e-3)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_files_hold_what_transformers_would_save(
    family: str, double: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Every tensor of ours equals that of a model that bitsandbytes quantized and transformers saved, Conv1D or not."""
    out = quantized(sources[family], tmp_path / "out", "--format", "nf4", *["--double-quant"] * double)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    peer = transformers.AutoModelForCausalLM.from_pretrained(sources[family], quantization_config=settings)
    peer.save_pretrained(tmp_path / "peer")
    ours = safetensors.torch.load_file(out / "model.safetensors")
    theirs = safetensors.torch.load_file(tmp_path / "peer" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        if "quant_state" in name:  # whose length is that of a number written out
            mine, expected = (json.loads(bytes(one.numpy())) for one in (ours[name], tensor))
            offset = mine.pop("nested_offset", 0), expected.pop("nested_offset", 0)
            assert list(mine.items()) == list(expected.items())
            assert offset[0] == pytest.approx(offset[1], rel=1e-6)
        elif name.endswith("nested_absmax"):  # less a mean that is summed in another order
            torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-7)
        else:
            assert ours[name].shape == tensor.shape, name
            assert torch.equal(ours[name], tensor), name
    entry = json.loads((out / "config.json").read_text())["quantization_config"]
    assert entry.keys() == settings.to_dict().keys()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("int8", False)])
def test_other_peoples_folders_are_imported(kind: str, double: bool, sources: dict[str, Path], tmp_path: Path) -> None:
    """What transformers saved: generated from as it is, and imported dequantized."""
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    settings = transformers.BitsAndBytesConfig(**(four if kind == "nf4" else {"load_in_8bit": True}))
    peer = transformers.AutoModelForCausalLM.from_pretrained(sources["gpt2"], quantization_config=settings)
    peer.save_pretrained(tmp_path / "peer")
    train_bpe([TEXT], VOCAB).save(tmp_path / "peer")
    expected = hf_peers.torch_logits(peer.dequantize(torch.float32), TOKENS_BT)
    tolerance = 5e-4 if kind == "nf4" else 5e-3
    np.testing.assert_allclose(our_logits(tmp_path / "peer", MESHES[1]), expected, atol=tolerance)
    assert cli.main(["import", str(tmp_path / "peer"), "--out", str(tmp_path / "ours")]) == 0
    assert cli.main(["generate", str(tmp_path / "ours"), "--max-new-tokens", "2"]) == 0
    assert cli.main(["generate", str(tmp_path / "peer"), "--max-new-tokens", "2"]) == 0


def test_bits_are_kept_on_the_mesh(sources: dict[str, Path], tmp_path: Path) -> None:
    out = quantized(sources["gpt2"], tmp_path / "out", "--format", "nf4")
    with jax.set_mesh(make_mesh(MESHES[2])):
        model = Model(config=convert.read_config(out))
        params = convert.load(out, model.config, model.abstract_params())
        weight = params["blocks"]["attn"]["o_NHD"]
        assert weight.packed_OKg.dtype == np.uint8
        assert weight.packed_OKg.nbytes == 2 * 64 * 64 // 2
        assert weight.packed_OKg.addressable_shards[0].data.nbytes == weight.packed_OKg.nbytes // 8


def test_large_models_are_cut_into_files(sources: dict[str, Path], tmp_path: Path) -> None:
    form = BnbForm(kind="nf4", shard_bytes=60_000)
    opened = convert.open_source(str(sources["gptj"]))
    tokenizer = train_bpe([TEXT], VOCAB)
    convert.quantize(
        convert.contents_of(opened.tensors, opened.config), opened.config, tokenizer, form, tmp_path / "out",
        lambda folder: None, lambda done, total: None,
    )  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {name: file for file in files for name in safetensors.numpy.load_file(tmp_path / "out" / file)}
    assert index["weight_map"] == found
    assert spread_error(our_logits(tmp_path / "out", MESHES[0]), our_logits(sources["gptj"], MESHES[0])) < 0.5


def test_cost_in_quality_is_told_and_kept(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, questions = tmp_path / "held.txt", tmp_path / "questions.jsonl"
    text.write_text(TEXT[:2000], encoding="utf-8")
    questions.write_text('{"ctx": "import", "endings": ["os", "zebra"], "label": 0}\n' * 3)
    flags = ("--format", "nf4", "--eval-text", str(text), "--eval-choices", str(questions))
    out = quantized(sources["gpt2"], tmp_path / "out", *flags)
    said, card = capsys.readouterr().out, (out / "README.md").read_text()
    for words in ("token perplexity, held", "bits per byte, held", "accuracy, questions", "bytes"):
        assert words in said
        assert words in card
    row = next(line for line in card.splitlines() if "token perplexity" in line)
    before, after = (float(cell) for cell in row.split("|")[2:4])
    assert 1 < before != after > 1


def test_a_run_is_measured_on_its_own_text(finished_gpt2: Path, tmp_path: Path) -> None:
    assert cli.main(["quantize", str(finished_gpt2), "--format", "int8", "--out", str(tmp_path / "out")]) == 0
    assert "token perplexity, held-out text" in (tmp_path / "out" / "README.md").read_text()
    plain, low = our_logits(finished_gpt2 / "export", MESHES[0]), our_logits(tmp_path / "out", MESHES[0])
    assert spread_error(low, plain) < 0.1


def test_refusals(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    say = functools.partial(refused, capsys, tmp_path / "out")
    gpt2 = str(sources["gpt2"])
    assert "--double-quant is for nf4" in say(gpt2, "--format", "int8", "--double-quant")
    assert "--double-quant is of nf4" in say(gpt2, "--format", "gguf-q8_0", "--double-quant")
    done = quantized(sources["gpt2"], tmp_path / "done", "--format", "fp4")
    assert "quantized already" in say(str(done), "--format", "nf4")
    capsys.readouterr()
    assert cli.main(["quantize", gpt2, "--format", "nf4", "--out", str(done)]) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert "no file" in say(gpt2, "--format", "nf4", "--eval-text", str(tmp_path / "none.txt"))


def test_rows_that_are_not_whole_blocks_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = GPT2Config(vocab_size=VOCAB, n_positions=16, n_layers=1, n_heads=2, d_model=40)
    hf_peers.peer(odd).save_pretrained(tmp_path / "odd")
    train_bpe([TEXT], VOCAB).save(tmp_path / "odd")
    said = refused(capsys, tmp_path / "out", str(tmp_path / "odd"), "--format", "nf4")
    assert "transformer.h.0.attn.c_attn.weight has 40 inputs, not a multiple of the block, 64" in said
    assert "not a multiple of the block of q8_0, 32" in refused(
        capsys, tmp_path / "out", str(tmp_path / "odd"), "--format", "gguf-q8_0"
    )
    quantized(tmp_path / "odd", tmp_path / "out", "--format", "int8")


@pytest.mark.parametrize("format_", ["nf4", "int8", "gguf-q8_0"])
@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.weight", "transformer.wte.weight"])
def test_values_that_are_not_finite_are_named(
    name: str, format_: str, sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    for path in sources["gpt2"].iterdir():
        (spoilt / path.name).write_bytes(path.read_bytes())

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors[name][3, 5] = torch.nan
        return tensors

    hf_peers.rewrite(spoilt, spoil)
    assert f"{name} holds a value that is not finite" in refused(
        capsys, tmp_path / "out", str(spoilt), "--format", format_
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {n: v for n, v in t.items() if not n.endswith("h.0.attn.c_attn.weight.absmax")}, "absmax"),
        (lambda t: t | {n: torch.zeros(4, dtype=torch.uint8) for n in t if "h.0" in n and "quant_state" in n}, "saves"),
        (lambda t: t | {n: v * torch.inf for n, v in t.items() if n.endswith("absmax")}, "not finite"),
        (lambda t: t | {n: v + 1 for n, v in t.items() if n.endswith("quant_map")}, "quant_map"),
    ],
)
def test_broken_folders_are_refused(change, words: str, sources: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = quantized(sources["gpt2"], tmp_path / "out", "--format", "nf4")
    hf_peers.rewrite(out, change)
    assert cli.main(["generate", str(out)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "quantize the model again" in said


def test_other_quantizers_are_named(sources: dict[str, Path], tmp_path: Path, capsys) -> None:
    out = quantized(sources["gpt2"], tmp_path / "out", "--format", "nf4")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert cli.main(["generate", str(out)]) == 2
    assert "gptq's; supported: bitsandbytes" in capsys.readouterr().err


_STREAM = """
import resource, sys
from pathlib import Path
import numpy as np
from meshgpt.convert.bitsandbytes_write import BnbForm
from meshgpt.convert.hf_names import stored_tensors
from meshgpt.models.gptj import GPTJConfig
from meshgpt.convert.safetensor import Writer, DTYPES
from meshgpt.data.special_tokens import TokenizerFiles

config = GPTJConfig(n_layers=6, n_heads=16, d_model=1024, vocab_size=8192)
folder = Path(sys.argv[1])

class Words:
    vocab_size, eot_id, prefix_id, stated = 8192, 0, 0, TokenizerFiles()
    def save(self, folder): pass

def contents():
    for tensor in stored_tensors(config):
        yield tensor, np.ones(tensor.shape, np.float32)

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
BnbForm(kind="nf4").write(contents(), config, Words(), folder, lambda done, total: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_host_holds_a_few_tensors_at_a_time(tmp_path: Path) -> None:
    """95 million parameters, 380 MB in float32, of which the largest tensor has 34 MB."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parent.parent)}
    ran = subprocess.run(
        [sys.executable, "-c", _STREAM, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert (tmp_path / "model.safetensors").stat().st_size > 60_000_000
    unit = 1024 if sys.platform != "darwin" else 1
    assert int(ran.stdout) * unit < 5 * 34_000_000, ran.stdout
