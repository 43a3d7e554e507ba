"""Model cards: true to the run's folder, valid for the hub, and unmoved by hostile names and damaged files."""

import dataclasses
import json
import math

import fake_run
import numpy as np
import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image

from meshgpt.config import Data
from meshgpt.data.mixture import Source, Stage
from meshgpt.data.prepare import Prepare, prepare
from meshgpt.errors import UserError
from meshgpt.hardware.power import DEVICES, by_kind, parse
from meshgpt.models.gptj import GPTJConfig
from meshgpt.report.blocks import Bullets, Code, Heading, Table, Text, clean, to_html, to_markdown
from meshgpt.report.card import CardOptions, card
from meshgpt.report.energy import Assumptions, energy
from meshgpt.report.evals import read_evals
from meshgpt.report.facts import read_facts
from meshgpt.report.front_matter import front_matter
from meshgpt.report.panels import panels
from meshgpt.report.write import document, read_runs, write_report


@pytest.fixture
def no_plots(monkeypatch):
    """Empty files for the PNG plots, where a test is not about them."""
    monkeypatch.setattr("meshgpt.report.write.draw_panel", lambda panel, path: path.touch())


HOSTILE = "<script>alert('a')</script> | `b` {{DATA}} **c** [d](e) $f$ \N{COLLISION SYMBOL}"
EVALS = {50: fake_run.harness(0.3, 60.0), 100: fake_run.harness(0.35, 40.0)}


def text_of(facts, options=None):
    return to_markdown(card(facts, panels([facts]), options or CardOptions()), "plots")


def row_of(markdown, first):
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_card_says_what_the_run_was(tmp_path):
    twice = [fake_run.SESSION, fake_run.SESSION | {"first_step": 50, "seconds": 1800.0}]
    facts = read_facts(fake_run.write(tmp_path / "small", sessions=twice, evals=EVALS))
    markdown = text_of(facts)
    # Counted by hand: embeddings 500 x 32 + 64 x 32; two blocks of 12 d^2 + 13 d; a final norm of 2 d.
    parameters = 500 * 32 + 64 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
    assert row_of(markdown, "n_parameters") == [f"{parameters:,}"]
    assert row_of(markdown, "d_ff") == ["128"]
    assert row_of(markdown, "Positional Encoding") == ["learned"]
    assert row_of(markdown, "Batch") == ["8 x 64 = 512 tokens"]
    assert row_of(markdown, "Tokens") == ["51,200"]
    assert row_of(markdown, "Learning rate") == ["peak 0.001, 10 steps of linear warmup, then Cosine (final 0.1)"]
    assert row_of(markdown, "Precision") == ["parameters in float32, computing in bfloat16"]
    flops = 6 * (2 * 12 * 32**2 + 500 * 32) + 12 * 2 * 32 * 64  # a token
    assert row_of(markdown, "Total FLOs")[0].startswith(f"{51200 * flops:.3g} ")
    assert markdown.count("| 1.5 (1h30m), in 2 sessions |") == 1
    assert "8 x NVIDIA A100-SXM4-80GB" in markdown
    assert row_of(markdown, "perplexity per token") == [f"{math.exp(3.1 + 3 * math.exp(-100 / 30)):.2f}"]
    # 1.5 h x 8 x 400 W = 4.8 kWh, x 0.48 kg
    assert row_of(markdown, "Emissions") == ["2.304 kg CO2 eq"]
    assert "12 device-hours of NVIDIA A100-SXM4-80GB at 400 W (NVIDIA data sheet)" in markdown
    assert "Ember, Global Electricity Review 2024" in markdown


def test_restarts_are_a_row_where_there_were_any(tmp_path):
    rows = [row | {"restarts": 2, "goodput": 0.5 + row["step"] / 300} for row in fake_run.rows()]
    folder = fake_run.write(tmp_path / "hardy", figures=rows)
    assert "Restarts" not in text_of(read_facts(folder))
    entry = {"restart": 1, "reason": HOSTILE, "began_at_step": 0, "last_step": 5, "processes": 2, "goodput": 0.1}
    times = ("2026-01-01T00:00:00Z", "2026-01-02T03:04:05Z", "2026-01-03T00:00:00Z")  # the first was set aside's
    lines = [json.dumps(entry | {"time": time}) for time in times]
    damage = ["[1]", "{}", json.dumps({"time": 3}), json.dumps({"time": HOSTILE})[:-1], '{"time": "2026-01-0']
    (folder / "restarts.jsonl").write_bytes("\n".join([*lines, *damage]).encode() + b"\xff\n")
    markdown = text_of(read_facts(folder))
    assert row_of(markdown, "Restarts") == ["2, goodput 83.3% (time of the steps that count, since the last launch)"]
    assert "alert" not in markdown
    (folder / "metrics.jsonl").write_text("")
    assert row_of(text_of(read_facts(folder)), "Restarts") == ["2"]


def test_evaluations_stand_beside_published_figures_and_by_iteration(tmp_path):
    markdown = text_of(read_facts(fake_run.write(tmp_path / "small", evals=EVALS)))
    header = row_of(markdown, "Model")
    assert header[:4] == ["HellaSwag acc ↑", "HellaSwag acc_norm ↑", "LAMBADA acc", "LAMBADA perplexity ↓"]
    assert row_of(markdown, "GPT-J 6B") == ["", "66.10%", "69.70%", "3.99", "published, GPT-J 6B card"]
    assert row_of(markdown, "gpt2 (124M)") == ["", "", "32.56%", "40.06", "published, GPT2(023) card"]
    ours = row_of(markdown, "**small**")
    assert ours[1] == "**35.00% ± 0.46**"
    assert ours[-2:] == ["**40.00**", "**measured here, step 100**"]
    assert "hellaswag: 10-shot" in markdown
    assert row_of(markdown, "50")[-4:] == ["28.00% ± 0.40", "30.00% ± 0.46", "15.00% ± 0.60", "60.00"]
    assert row_of(markdown, "75")[-4:] == ["", "", "", ""]


def test_the_hub_accepts_the_front_matter_and_reads_the_results(tmp_path):
    options = CardOptions(license="apache-2.0", language=("en", "de"), location="Iceland")
    folder = fake_run.write(tmp_path / "small", evals=EVALS)
    write_report(read_runs([folder]), tmp_path / "out", options)
    loaded = ModelCard.load(tmp_path / "out" / "README.md")
    assert isinstance(loaded.data, ModelCardData)
    fields = loaded.data.to_dict()
    assert (fields["license"], fields["language"], fields["library_name"]) == (
        "apache-2.0",
        ["en", "de"],
        "transformers",
    )
    assert fields["co2_eq_emissions"]["emissions"] == pytest.approx(8 * 0.4 * 0.48 * 1000)
    assert fields["co2_eq_emissions"]["geographical_location"] == "Iceland"
    assert loaded.data.model_name == "small"
    assert loaded.data.eval_results is not None
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in loaded.data.eval_results}
    assert found["hellaswag", "acc_norm"] == 0.35
    assert found["lambada_openai", "perplexity"] == 40.0
    assert found["held-out", "perplexity"] == pytest.approx(math.exp(3.1 + 3 * math.exp(-100 / 30)))
    name, results = model_index_to_eval_results(
        yaml.safe_load(front_matter(read_facts(folder), options)[4:-4])["model-index"]
    )
    assert name == "small"
    assert all(isinstance(result, EvalResult) for result in results)
    assert loaded.text.lstrip().startswith("# small")
    for name in ("loss_tokens", "loss_flops", "learning_rate", "grad_norm", "tokens_per_second", "tasks", "perplexity"):
        assert f"(plots/{name}.png)" in loaded.text
        with Image.open(tmp_path / "out" / "plots" / f"{name}.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_gptj_cards_explain_the_published_count(tmp_path):
    facts = read_facts(fake_run.write(tmp_path / "six", fake_run.run(model=GPTJConfig())))
    markdown = text_of(facts)
    assert row_of(markdown, "n_parameters") == ["6,050,882,784"]
    assert "GPT-J is published with 6,053,381,344" in markdown
    assert row_of(markdown, "RoPE Dimensions") == ["64"]
    assert row_of(markdown, "n_vocab") == [
        "50,400 (the embedding is padded to 50,432; the padding is masked and not exported)"
    ]


def test_training_data_has_its_tokens_by_source(tmp_path):
    sizes = {"books/a.txt": 300, "books/b.txt": 200, "code/c.txt": 100}
    for name, words in sizes.items():
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text(" ".join(f"{name[0]}word{i}" for i in range(words)))
    request = Prepare(
        sources=(str(tmp_path / "text"),), out=str(tmp_path / "store"), train_tokenizer="bpe", vocab_size=300,
        val_fraction=0.0, workers=1,
    )  # fmt: skip
    store = prepare(request, lambda label, done, total: None)
    facts = read_facts(fake_run.write(tmp_path / "small", fake_run.run(store=str(store.folder))))
    total = store.split("train").num_tokens
    assert sum(source.tokens for source in facts.sources) == total
    assert sum(source.bytes for source in facts.sources) == store.split("train").num_bytes
    assert {source.name for source in facts.sources} == set(sizes)
    assert [source.tokens for source in facts.sources] == sorted((s.tokens for s in facts.sources), reverse=True)
    markdown = text_of(facts)
    assert f"{total:,} tokens of training text" in markdown
    for source in facts.sources:
        assert row_of(markdown, source.name)[:2] == [f"{source.tokens:,}", f"{source.tokens / total:.1%}"]


def test_a_mixture_has_what_was_seen_of_each_source(tmp_path):
    sources = []
    for name, words in (("books", 4000), ("code", 2000)):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name[0]}word{i}" for i in range(words)))
        first = {"train_tokenizer": "bpe", "vocab_size": 300}
        tokenizer = {"tokenizer": f"{sources[0].store}/tokenizer"} if sources else first
        request = Prepare(
            sources=(str(tmp_path / f"{name}.txt"),), out=str(tmp_path / name), val_fraction=0.0, workers=1, **tokenizer
        )
        store = prepare(request, lambda label, done, total: None)
        sources.append(Source(store=str(store.folder), weight=3.0 if name == "books" else 1.0, max_epochs=0.0))
    config = fake_run.run()
    config = dataclasses.replace(config, data=Data(mixture=(Stage(sources=tuple(sources)),)))
    facts = read_facts(fake_run.write(tmp_path / "mixed", config))
    books, code = facts.sources
    assert (books.name, code.name) == ("books", "code")
    assert books.seen is not None
    assert code.seen is not None
    assert books.seen + code.seen == facts.tokens
    assert books.seen == pytest.approx(0.75 * facts.tokens, rel=0.01)
    assert row_of(text_of(facts), "books")[-2:] == [f"{books.seen:,}", f"{books.seen / books.tokens:.2f}"]


@pytest.mark.parametrize("figures", [[], [{"step": 1, "tokens": 512, "loss": None}]])
def test_a_run_that_has_hardly_begun_gets_a_card(tmp_path, figures, no_plots):
    folder = fake_run.write(tmp_path / "new", figures=figures, sessions=())
    files = write_report(read_runs([folder]), tmp_path / "out", CardOptions())
    text = files[0].read_text()
    assert "in progress" in text
    assert "No held-out text was evaluated yet" in text
    assert "No task was evaluated yet: meshgpt eval new" in text
    assert text.count("| Hours | not recorded |") == 2
    assert ModelCard.load(files[0]).data.to_dict()["license"] == "unknown"


def test_damage_is_said_and_the_rest_is_used(tmp_path):
    folder = fake_run.write(tmp_path / "torn", tail='{"step": 105, "lo', evals=EVALS)
    (folder / "evals" / "latest.json").write_text("{}")
    (folder / "evals" / "75.json").write_text('{"results": [1]}')
    facts = read_facts(folder)
    notes = " ".join(facts.notes)
    assert "metrics.jsonl is cut off within its last line (21), and was read up to there" in notes
    assert "latest.json in evals/ is not a file of results" in notes
    assert "75.json in evals/ is not a file of results" in notes
    assert "its token store cannot be read" in notes
    assert facts.step == 100
    assert {result.step for result in facts.results} == {50, 100}
    for note in facts.notes:
        assert clean(note).split(":")[0] in text_of(facts).replace("\\", "")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0] + "\0\0\n" + "".join(lines[1:20]))
    assert "1 lines of metrics.jsonl could not be read (the first is line 2)" in " ".join(read_facts(folder).notes)


def test_evaluations_in_the_loop_are_keys_of_the_metrics(tmp_path):
    loop = [{"step": 10, "loss": 3.0, "eval/hellaswag/acc_norm": 0.3, "val/wiki/loss": 3.5, "val/code/loss": 2.5}]
    facts = read_facts(fake_run.write(tmp_path / "loop", figures=loop, evals={10: EVALS[50]}))
    by_key = {(r.task, r.metric): r.value for r in facts.results}
    assert by_key["hellaswag", "acc_norm"] == 0.3
    only, _ = read_evals(tmp_path / "none", [{"step": 3, "eval/a/b/acc": 0.5, "eval/x": 1.0, "eval/y/acc": None}])
    assert [(r.step, r.task, r.metric) for r in only] == [(3, "a/b", "acc")]
    (panel,) = [panel for panel in panels([facts]) if panel.slug == "validation"]
    assert [series.label for series in panel.series] == ["wiki", "code"]
    assert row_of(text_of(facts), "Step")[3:5] == ["val/code/loss", "val/wiki/loss"]


def test_a_value_that_is_not_finite_is_a_gap_in_every_curve(tmp_path):
    figures = list(fake_run.rows())
    figures[9] |= {"loss": None, "grad_norm": None}
    facts = read_facts(fake_run.write(tmp_path / "gap", figures=figures))
    for slug, number in (("loss_tokens", 0), ("loss_tokens", 1), ("loss_flops", 0), ("grad_norm", 0)):
        (panel,) = [panel for panel in panels([facts]) if panel.slug == slug]
        assert np.flatnonzero(np.isnan(panel.series[number].y)).tolist() == [9]


def test_hostile_names_are_text_in_the_card(tmp_path, no_plots):
    folder = fake_run.write(tmp_path / HOSTILE.replace("/", "\N{DIVISION SLASH}"), evals={1: EVALS[50]})
    record = json.loads((folder / "run.json").read_text())
    record["command"] = "```\n# not a heading\n\x1b[31m</code><img src=x>"
    (folder / "run.json").write_text(json.dumps(record))
    (file, *_) = write_report(read_runs([folder]), tmp_path / "out", CardOptions(author="}\nx = {"))
    text = file.read_text()
    assert "<script" not in text
    assert "\x1b" not in text
    loaded = ModelCard.load(file)
    assert loaded.data.model_name == clean(folder.name)
    assert text.count("\n# ") == 1  # the title; nothing of the command became a heading
    table = next(line for line in text.splitlines() if line.startswith("| **"))
    assert table.count("|") - table.count("\\|") == len(row_of(text, "Model")) + 2


def test_two_runs_stand_beside_each_other(tmp_path, no_plots):
    other = [row | {"val_loss": 2.0} if "val_loss" in row else row for row in fake_run.rows(50)]
    runs = read_runs([
        fake_run.write(tmp_path / "a"), fake_run.write(tmp_path / "b", fake_run.run(seed=3), figures=other, evals=EVALS)
    ])  # fmt: skip
    title, blocks, drawn = document(runs, CardOptions())
    assert title == "a and b"
    text = to_markdown(blocks, "plots")
    assert row_of(text, "a")[2] == "51.2k"
    assert row_of(text, "**b**")[1] == "**50 of 100**"
    assert row_of(text, "seed") == ["0", "3"]
    (loss,) = [panel for panel in drawn if panel.slug == "loss_tokens"]
    assert [series.label for series in loss.series if series.kind == "marked"] == ["validation a", "validation b"]
    assert len({series.color for series in loss.series}) == 2
    files = write_report(runs, tmp_path / "out", CardOptions())
    assert files[0].read_text().startswith("# a and b")
    again = read_runs([tmp_path / "a", fake_run.write(tmp_path / "old" / "a")])
    assert [run.name for run in again] == [f"{tmp_path.name}/a", "old/a"]
    with pytest.raises(UserError, match="the same run is named twice"):
        read_runs([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_no_run_and_no_room_are_explained(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        read_runs([tmp_path])
    runs = read_runs([fake_run.write(tmp_path / "a")])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the report to .*give another --out"):
        write_report(runs, tmp_path / "file" / "x", CardOptions())


def test_energy_follows_its_factors():
    hours = {"NVIDIA H200": 10.0, "Tesla T4": 2.0}
    spent = energy(hours, Assumptions(pue=1.5, kg_per_kwh=0.1))
    assert spent.kwh == pytest.approx((10 * 0.7 + 2 * 0.07) * 1.5)
    assert spent.kg == pytest.approx((10 * 0.7 + 2 * 0.07) * 0.15)
    assert energy({"cpu": 3.0}, Assumptions()).kwh is None
    assert "--energy.watts" in energy({"cpu": 3.0}, Assumptions()).basis[0]
    assert energy({"cpu": 3.0}, Assumptions(watts=50)).kwh == pytest.approx(0.15)
    assert energy({}, Assumptions()).kg is None
    for bad in ({"watts": -1.0}, {"pue": 0.9}, {"kg_per_kwh": math.nan}):
        with pytest.raises(UserError, match=r"give a (finite number|number of at least)"):
            Assumptions(**bad)


def test_devices_are_found_by_the_names_that_people_type():
    assert parse("8xA100")[0] == 8
    assert parse("tpuv4")[1].kind == "TPU v4"
    assert all(by_kind(device.kind) == device for device in DEVICES)
    for bad in ("", "8x", "0xA100", "8xA1000", "A100x8"):
        with pytest.raises(UserError, match="give a number and a device, as 8xA100"):
            parse(bad)


def test_blocks_are_escaped_in_both_forms():
    hostile = "a|b <i>&amp; `c` *d* # e\n# f\x00"
    blocks = [
        Heading(level=2, text=hostile),
        Text(text=hostile),
        Bullets(items=[hostile, "1. one", "- two"]),
        Table(header=("x", "y"), rows=[(hostile, "1")], strong=(0,), note=hostile),
        Code(language="", text="````\n<b>"),
    ]
    page = to_html(blocks)
    assert "<i>" not in page
    assert "<b>" not in page
    assert page.count("&lt;i&gt;&amp;amp;") == 5
    markdown = to_markdown(blocks, "plots")
    assert "<i>" not in markdown
    assert "\x00" not in markdown
    assert "- 1\\. one\n- \\- two" in markdown
    assert "`````\n````\n<b>\n`````" in markdown
