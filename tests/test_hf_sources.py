"""Where models come from: PyTorch's files, shards, and a hub that can fail."""

import http.server
import json
import os
import pickle
import shutil
import sys
import threading
from hashlib import sha256
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import torch
from hf_peers import GPT2_TINY, GPTJ_TINY, assert_equal_trees, live, peer

from meshgpt import convert
from meshgpt.convert import hub
from meshgpt.errors import MachineError, UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    peer(GPT2_TINY).save_pretrained(folder)
    return folder


def as_torch(folder: Path, out: Path, shards: int = 1, **save) -> Path:
    """The model in `folder` as pytorch_model.bin, or as that many shards of it."""
    out.mkdir()
    shutil.copy(folder / "config.json", out)
    tensors = hf_tensors(folder)
    if shards == 1:
        torch.save(tensors, out / "pytorch_model.bin", **save)
        return out
    weight_map = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, out / file, **save)
    (out / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("config", "dtype"), [(GPT2_TINY, "float32"), (GPTJ_TINY, "bfloat16"), (GPTJ_TINY, "float16")])
@pytest.mark.parametrize("shards", [1, 3])
def test_torch_files_give_what_safetensors_give(config, dtype, shards, tmp_path):
    peer(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "st")
    as_torch(tmp_path / "st", tmp_path / "bin", shards)
    params, _ = live(config)
    source = convert.open_source(str(tmp_path / "bin"))
    assert (source.config.n_layers, source.notes, source.adam, source.tokenizer) == (config.n_layers, (), None, None)
    assert_equal_trees(convert.load(tmp_path / "bin", config, params), convert.load(tmp_path / "st", config, params))


def test_torch_file_of_before_1_6_is_read(gpt2_folder, tmp_path):
    as_torch(gpt2_folder, tmp_path / "bin", _use_new_zipfile_serialization=False)
    params, _ = live(GPT2_TINY)
    assert_equal_trees(convert.load(tmp_path / "bin", GPT2_TINY, params), convert.load(gpt2_folder, GPT2_TINY, params))


def reversed_(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.permute(*reversed(range(tensor.ndim)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_file_of_transposed_views_and_parameters_is_read(gpt2_folder, tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in hf_tensors(gpt2_folder).items()}
    folder = as_torch(gpt2_folder, tmp_path / "bin")
    views = {name: torch.nn.Parameter(reversed_(reversed_(tensor).contiguous())) for name, tensor in tensors.items()}
    torch.save(views | {"lm_head.weight": views["transformer.wte.weight"]}, folder / "pytorch_model.bin")
    params, _ = live(GPT2_TINY)
    expected = as_torch(gpt2_folder, tmp_path / "plain")
    torch.save(tensors, expected / "pytorch_model.bin")
    assert_equal_trees(convert.load(folder, GPT2_TINY, params), convert.load(expected, GPT2_TINY, params))


def test_sharded_safetensors_of_transformers_are_read(gpt2_folder, tmp_path):
    peer(GPT2_TINY).save_pretrained(tmp_path, max_shard_size="9KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    params, _ = live(GPT2_TINY)
    assert_equal_trees(convert.load(tmp_path, GPT2_TINY, params), convert.load(gpt2_folder, GPT2_TINY, params))


class Creating:
    """Unpickled without restriction, this makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_pickle_that_does_something_is_refused_and_not_run(gpt2_folder, tmp_path, new):
    folder = as_torch(gpt2_folder, tmp_path / "bin")
    made = tmp_path / "made"
    for content in ({"wte.weight": Creating(made)}, Creating(made)):
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        with pytest.raises(UserError, match="refused, and nothing in it was run"):
            convert.open_source(str(folder))
        assert not made.exists()
    pickle.loads(pickle.dumps(Creating(made))).close()
    assert made.exists()  # so the test would have seen it


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({"state_dict": {"wte.weight": torch.zeros(2)}}, "'state_dict', a dict that is not a plain tensor"),
        ({"step": 3}, "'step', a int"),
        ({0: torch.zeros(2)}, "holds 0"),
        ({"wte.weight": torch.eye(3).to_sparse()}, "not a plain tensor"),
        ({"wte.weight": torch.zeros(97, 16, dtype=torch.int8)}, r"dtype: transformer.wte.weight is int8"),
        ({"wte.weight": torch.zeros(97, 16, dtype=torch.complex64)}, r"dtype: transformer.wte.weight is complex64"),
    ],
)
def test_torch_file_of_anything_but_tensors_is_refused(gpt2_folder, tmp_path, content, message):
    folder = as_torch(gpt2_folder, tmp_path / "bin")
    torch.save(content, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        convert.open_source(str(folder))


@pytest.mark.parametrize("keep", [0, 10, 2000, -1])
def test_truncated_torch_file_is_refused(gpt2_folder, tmp_path, keep):
    folder = as_torch(gpt2_folder, tmp_path / "bin", 2)
    file = folder / "pytorch_model-00001-of-00002.bin"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"00001-of-00002.bin is (cut short|broken)"):
        convert.open_source(str(folder))


@pytest.mark.parametrize(
    ("name", "message"), [("/etc/passwd", "refused"), ("../up.bin", "refused"), ("x.bin", "missing: x.bin")]
)
def test_bad_index_of_torch_files_is_refused(gpt2_folder, tmp_path, name, message):
    folder = as_torch(gpt2_folder, tmp_path / "bin", 2)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"wte.weight": name}}))
    with pytest.raises(UserError, match=message):
        convert.open_source(str(folder))


def test_index_naming_another_kind_of_file_is_refused(gpt2_folder, tmp_path):
    folder = as_torch(gpt2_folder, tmp_path / "bin", 2)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"wte.weight": "config.json"}}))
    with pytest.raises(UserError, match=r"neither \.safetensors nor \.bin"):
        convert.open_source(str(folder))


def test_torch_file_without_torch_says_so(gpt2_folder, tmp_path, monkeypatch):
    folder = as_torch(gpt2_folder, tmp_path / "bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install torch"):
        convert.open_source(str(folder))


def test_other_architecture_is_named_with_what_is_supported(gpt2_folder, tmp_path):
    folder = Path(shutil.copytree(gpt2_folder, tmp_path / "model"))
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UserError, match="model_type is 'llama'; supported: 'gpt2', 'gptj'"):
        convert.open_source(str(folder))


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's API that a download needs: repositories are folders of `root`."""

    root: Path
    asked: list[str]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.asked.append(f"{self.command} {path}")
        where = path.removeprefix("api/models/")
        folder = self.root / "/".join(where.split("/")[:2])
        if not folder.is_dir() or folder == self.root:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in where:
            content = (folder / where.rpartition("/")[2]).read_bytes()
            self._answer(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(content).hexdigest()}"'})
        elif "/tree/" in where:
            rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name} for f in folder.iterdir()]
            self._answer(200, json.dumps(rows).encode(), {})
        elif where.endswith(("revision/main", f"revision/{COMMIT}")):
            self._answer(200, json.dumps({"id": "o/m", "sha": COMMIT, "siblings": []}).encode(), {})
        elif "gated" in where:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})

    do_HEAD = do_GET

    def _answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def fake_hub(tmp_path, monkeypatch, gpt2_folder):
    """A hub on this machine with the models o/safe (which has code and a .bin too) and o/torch, and an empty cache."""
    root = tmp_path / "hub"
    shutil.copytree(gpt2_folder, root / "o" / "safe")
    (root / "o" / "safe" / "modeling.py").write_text("raise SystemExit")
    (root / "o" / "safe" / "pytorch_model.bin").write_bytes(b"not to be downloaded")
    as_torch(gpt2_folder, root / "o" / "torch")

    class Handler(Hub):
        asked: list[str] = []  # noqa: RUF012 (one for each server)

    Handler.root = root
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    stopped = []

    def stop() -> None:
        if not stopped:
            server.shutdown()
            server.server_close()
            thread.join()
            stopped.append(True)

    Handler.stop = staticmethod(stop)
    yield Handler
    stop()


def test_hub_model_is_downloaded_once_and_only_what_is_needed(fake_hub, gpt2_folder, tmp_path):
    source = convert.open_source("o/safe")
    assert source.config == convert.read_config(gpt2_folder)
    cached = {path.name for path in (tmp_path / "cache").glob("models--o--safe/snapshots/*/*")}
    assert cached == {"config.json", "generation_config.json", "model.safetensors"}
    before = [line for line in fake_hub.asked if line.startswith("GET o/")]
    convert.open_source("o/safe@main")
    assert [line for line in fake_hub.asked if line.startswith("GET o/")] == before
    fake_hub.stop()  # no network: what is in the cache still serves
    params, _ = live(source.config)
    assert_equal_trees(convert.open_source("o/safe").load(params), convert.load(gpt2_folder, source.config, params))


def test_hub_model_with_torch_files_only(fake_hub, gpt2_folder):
    source = convert.open_source("o/torch")
    found = source.tensors.entries["transformer.wte.weight"].map()
    np.testing.assert_array_equal(found, hf_tensors(gpt2_folder)["transformer.wte.weight"].numpy())


def test_offline_mode_is_respected(fake_hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="neither a folder here nor complete in the hub's cache"):
        convert.open_source("o/safe")
    assert fake_hub.asked == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("o/none", "no such model on the hub"),
        ("o/safe@v2", "o/safe on the hub has no revision 'v2'"),
        ("./o/safe", "neither a folder nor a model's id"),
        ("/no/where", "neither a folder nor a model's id"),
        ("a/b/c", "neither a folder nor a model's id"),
        ("..", "is not a Hugging Face model"),
    ],
)
def test_source_that_is_not_there(fake_hub, source, message):
    with pytest.raises(UserError, match=message):
        convert.open_source(source)


def test_no_network_and_nothing_in_the_cache(fake_hub):
    fake_hub.stop()
    with pytest.raises(MachineError, match=r"the hub cannot be reached \(.*[Cc]onnection refused\)"):
        convert.open_source("o/safe")


def test_no_room_for_the_download(fake_hub, monkeypatch, tmp_path):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 0, 1000))
    with pytest.raises(UserError, match=r"bytes to download and .* has 1,000 free"):
        convert.open_source("o/safe")
    assert not list(tmp_path.glob("cache/**/*.safetensors"))


def test_gated_model_says_what_to_do(fake_hub, gpt2_folder):
    shutil.copytree(gpt2_folder, fake_hub.root / "o" / "gated")
    with pytest.raises(UserError, match="terms accepted first"):
        convert.open_source("o/gated@secret")


def test_hub_without_the_extra_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'meshgpt\[hf\]'"):
        convert.open_source("o/safe")


def test_file_instead_of_a_folder(gpt2_folder):
    with pytest.raises(UserError, match="neither a folder nor"):
        convert.open_source(os.fspath(gpt2_folder / "config.json"))
