"""What a run saw, from its folder alone: order, show, find, inspect; the same on every mesh; changed data refused."""

import dataclasses
import hashlib
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest

from meshgpt.cli.verbs import data as command
from meshgpt.config import Data, Run
from meshgpt.data.mixture import Source, Stage
from meshgpt.data.packing import pack
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.store import Store
from meshgpt.distributed.batch import Feed
from meshgpt.errors import UserError
from meshgpt.models.model import GPT2Config
from meshgpt.training.data import RunData, open_run_data
from meshgpt.training.run_folder import RunFolder

LIBRARY = Path(sysconfig.get_path("stdlib"))
MODEL = GPT2Config(vocab_size=400, n_positions=32, n_layers=1, n_heads=2, d_model=8)


def request(name: str, out: Path, tokenizer: Path | None = None) -> Prepare:
    trained = {"train_tokenizer": "bpe", "vocab_size": 400} if tokenizer is None else {"tokenizer": str(tokenizer)}
    return Prepare(
        sources=(str(LIBRARY / name),), extensions=(".py",), out=str(out), val_fraction=0.2, workers=1, **trained
    )


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("stores")
    for name in ("asyncio", "email"):
        tokenizer = None if name == "asyncio" else folder / "asyncio" / "tokenizer"
        pack(prepare(request(name, folder / name, tokenizer), lambda *_: None), 32)
    return [folder / "asyncio", folder / "email"]


def start(run: Run) -> RunData:
    """Everything that training leaves behind for the ledger, without the training."""
    folder = RunFolder(Path(run.run_dir))
    with folder.claimed(run, "", print):
        opened = open_run_data(run, folder)
        opened.write_ledger(folder.ledger)
    return opened


@pytest.fixture
def mixed(stores: list[Path], tmp_path: Path) -> Run:
    first, second = (Source(store=str(store), weight=w, max_epochs=0) for store, w in zip(stores, (3, 1), strict=True))
    mixture = (Stage(sources=(first, second), until_step=40), Stage(sources=(second,)))
    return Run(
        model=MODEL,
        data=Data(mixture=mixture, packing="best_fit"),
        steps=60,
        global_batch=16,
        run_dir=str(tmp_path / "run"),
    )


def lines(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    capsys.readouterr()
    command([str(argument) for argument in arguments])
    return capsys.readouterr().out.splitlines()


def test_every_mesh_and_split_sees_what_order_says(mixed: Run, on_mesh, capsys: pytest.CaptureFixture[str]):
    batches = start(mixed).batches
    printed = lines(capsys, "order", mixed.run_dir, "--from-step", 39, "--to-step", 42)
    assert [line.split()[0] for line in printed] == ["39", "40", "41", "42"]
    for line in printed:
        step = int(line.split()[0])
        for mesh, accumulate in (((1, 1, 1), 1), ((2, 1, 1), 4), ((2, 2, 2), 2), ((1, 8, 1), 1), ((1, 1, 4), 8)):
            with on_mesh(*mesh):
                feed = Feed(jax.sharding.get_mesh(), accumulate, 16 // accumulate)
                tokens, weights = batches.rows(step - 1, feed.rows)
                weights = np.ones((len(tokens), 32), np.float32) if weights is None else weights
                seen = [np.asarray(feed.place(part)).reshape(16, -1) for part in (tokens, weights)]
            digest = hashlib.sha256(seen[0].astype("<i4").tobytes() + seen[1].astype("<f4").tobytes()).hexdigest()
            assert line == f"{step} {digest}"
    with pytest.raises(UserError, match="--from-step 9 --to-step 3"):
        command(["order", mixed.run_dir, "--from-step", "9", "--to-step", "3"])


def test_show_prints_the_documents_of_a_row(mixed: Run, capsys: pytest.CaptureFixture[str]):
    opened = start(mixed)
    tokenizer = opened.tokenizer()
    for step, row in ((1, 3), (50, 0)):
        tokens, weights = opened.batches.rows(step - 1, [row])
        counted = 32 if weights is None else int(weights.sum())
        shown = "\n".join(lines(capsys, "show", mixed.run_dir, "--step", step, "--row", row)).split("\n--- ")
        assert shown[0] == f"=== step {step}, row {row}, source {'asyncio' if step == 1 else 'email'}"
        texts = [part.split("\n", 1)[1] for part in shown[1:]]
        assert "\n".join(texts).replace("\n", "") == tokenizer.decode(tokens[0, 1 : 1 + counted].tolist()).replace(
            "\n", ""
        )
        assert all(f"{LIBRARY}/" in part.split("\n")[0] for part in shown[1:])
    assert sum(line.startswith("=== ") for line in lines(capsys, "show", mixed.run_dir, "--step", 2)) == 16
    for arguments, message in ((["--step", "0"], "--step 0"), (["--step", "1", "--row", "16"], "rows 0 to 15")):
        with pytest.raises(UserError, match=message):
            command(["show", mixed.run_dir, *arguments])


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_find_names_the_steps_that_see_it(mixed: Run, packing: str, capsys: pytest.CaptureFixture[str]):
    stage = Stage(sources=mixed.data.mixture[0].sources)
    run = dataclasses.replace(mixed, data=Data(mixture=(stage,), packing=packing), steps=500)
    opened = start(run)
    split, tokenizer = opened.first_store.split("train"), opened.tokenizer()
    whole = tokenizer.decode(split.tokens(0, split.num_tokens))
    text = next(
        t for t in (whole[i : i + 25] for i in range(50_000, 60_000)) if whole.count(t) == 1 and t.isprintable()
    )
    found = [line for line in lines(capsys, "find", run.run_dir, text) if "seen" in line or "tokens" in line]
    assert f"{LIBRARY}/asyncio" in found[0]
    steps = [int(step.replace(",", "")) for step in found[1].split("step ")[1].split(" of")[0].split(", ")]
    number = next(i for i in range(split.num_documents) if text in tokenizer.decode(split.document_tokens(i)))
    first, last = (int(n.replace(",", "")) for n in found[0].split(", tokens ")[1].split(" to "))
    begin = split.document_range(number)[0]
    start_token, stop_token = begin + first, begin + last + 1
    assert text in tokenizer.decode(split.tokens(start_token, stop_token))
    assert text not in tokenizer.decode(split.tokens(start_token + 1, stop_token))
    source_n, record_n = opened.batches.locate(np.arange(500 * 16))
    records = opened.batches.sources[0]
    holding = [r for r in range(len(records)) if any(a < stop_token and b > start_token for a, b in records.pieces(r))]
    sequences = np.flatnonzero((source_n == 0) & np.isin(record_n, holding))
    assert steps == sorted({int(n) // 16 + 1 for n in sequences})
    assert len(steps) >= 1
    store = opened.first_store.folder
    assert found[1] in lines(capsys, "find", store, text, "--run", run.run_dir)
    assert lines(capsys, "find", store, "no such text anywhere")[-1] == "no document contains it"
    with pytest.raises(UserError, match="which text"):
        command(["find", str(store), ""])


def test_inspect_in_text_and_picture(stores: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    png = tmp_path / "look.png"
    seen = "\n".join(lines(capsys, "inspect", stores[0], "--png", png))
    split = Store.open(stores[0]).split("train")
    assert f"train: {split.num_documents:,} documents, {split.num_tokens:,} tokens" in seen
    assert f"{split.num_bytes / split.num_tokens:.3f} bytes a token" in seen
    assert "unknown bytes: 0 replaced" in seen
    assert split.document_name(0) in seen
    tokens = split.tokens(0, split.num_tokens)
    top = np.bincount(tokens).argmax()
    share = np.mean(tokens == top)
    assert f"{Store.open(stores[0]).tokenizer().decode([int(top)])!r} {share:.2%}" in seen
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="name another place with --png"):
        command(["inspect", str(stores[0]), "--png", str(tmp_path / "no" / "look.png")])
    with pytest.raises(UserError, match="no verb 'data lok'"):
        command(["lok"])


def test_a_run_that_never_began(tmp_path: Path):
    with pytest.raises(UserError, match="holds no run"):
        command(["order", str(tmp_path)])


def single(tmp_path: Path, prepared: Prepare) -> Run:
    return Run(model=MODEL, data=Data(prepare=prepared), steps=5, global_batch=4, run_dir=str(tmp_path / "run"))


def test_a_changed_source_is_refused_with_a_remedy_that_works(tmp_path: Path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"document {i} says {i * i} " * 30)
    asked = Prepare(sources=(str(text),), out="", train_tokenizer="bpe", vocab_size=300, val_fraction=0.2, workers=1)
    run = single(tmp_path, asked)
    before = start(run)
    (text / "3.txt").write_text("something else " * 50)
    remedies = r"removed or changed.*--data.store .*run/data, or .*--data.prepare.overwrite --resume never"
    with pytest.raises(UserError, match=rf"not what .*run/data was prepared from: .*3\.txt was added, {remedies}"):
        start(run)
    as_it_is = dataclasses.replace(run, data=dataclasses.replace(run.data, store=str(tmp_path / "run" / "data")))
    start(as_it_is).check_unchanged(before.record(), "step 5")
    again = dataclasses.replace(run.data, prepare=dataclasses.replace(asked, overwrite=True))
    after = start(dataclasses.replace(run, data=again, resume="never"))
    with pytest.raises(UserError, match=r"run/data has other tokens than the run had at step 5 .*--resume never"):
        after.check_unchanged(before.record(), "step 5")


def test_other_packing_and_other_order_are_refused(mixed: Run, tmp_path: Path):
    before = start(mixed)
    recorded = before.record()
    concatenated = dataclasses.replace(mixed.data, packing="concatenate")
    other = start(dataclasses.replace(mixed, data=concatenated, run_dir=str(tmp_path / "other")))
    with pytest.raises(UserError, match="asyncio has other packing"):
        other.check_unchanged(recorded, "step 5")
    with pytest.raises(UserError, match="puts the run's data into another order than at step 5"):
        before.check_unchanged([{**row, "first_step": "0"} for row in recorded], "step 5")
    moved = [recorded[0], {**recorded[1], "digest": "0"}]
    with pytest.raises(UserError, match=r"email has other tokens than the run had at step 5"):
        before.check_unchanged([{**row, "first_step": "0"} for row in moved], "step 5")
    with pytest.raises(UserError, match="the source 'email' was not there at step 5"):
        before.check_unchanged(recorded[:1], "step 5")


def test_stores_with_other_tokenizers_or_too_many_ids_are_refused(stores: list[Path], mixed: Run, tmp_path: Path):
    prepare(dataclasses.replace(request("json", tmp_path / "json"), vocab_size=300, val_fraction=0.0), lambda *_: None)
    sources = (Source(store=str(stores[0])), Source(store=str(tmp_path / "json")))
    run = dataclasses.replace(mixed, data=Data(mixture=(Stage(sources=sources),)))
    with pytest.raises(UserError, match=r"is not the one that made the store .*json"):
        start(run)
    small = dataclasses.replace(MODEL, vocab_size=300)
    with pytest.raises(UserError, match=r"asyncio has 400 token ids and the model 300: give --model.vocab-size 400"):
        start(dataclasses.replace(mixed, model=small))
    with pytest.raises(UserError, match=r"data.mixture takes the place of data.store"):
        Data(store="a", mixture=mixed.data.mixture)
    with pytest.raises(UserError, match=r"no data: give --data\.store"):
        start(dataclasses.replace(mixed, data=Data()))
