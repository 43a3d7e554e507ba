"""A model card of a run, in the form of the cards on the Hugging Face hub."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from meshgpt.config import Run
from meshgpt.evals.intervals import held_out_interval
from meshgpt.models import flops
from meshgpt.models.model import GPTJConfig, ModelConfig, parameter_shapes
from meshgpt.models.trainable import Full
from meshgpt.objectives.distillation import Distill
from meshgpt.optim.schedules import Piecewise, fitting_warmup
from meshgpt.report import lineage
from meshgpt.report.blocks import Block, Bullets, Code, Figure, Heading, Table, Text, clean
from meshgpt.report.distillation import distillation
from meshgpt.report.energy import Assumptions, Energy, energy
from meshgpt.report.facts import Facts
from meshgpt.report.panels import Panel
from meshgpt.report.tables import by_iteration, references
from meshgpt.settings import settings
from meshgpt.training.trackers import amount, duration

TO_FILL = "(to fill in)"


@settings("card")
class CardOptions:
    """What a run's folder cannot know."""

    license: str = "unknown"
    """The model's license as the Hugging Face hub names it, for example apache-2.0."""
    language: tuple[str, ...] = ()
    """Languages of the text, as ISO 639-1 codes."""
    author: str = ""
    """Name of the author, for the citation."""
    base_model: str = ""
    """Hub id of the weights that the run began with (--init), where the run's folder does not know it."""
    location: str = ""
    """Place where the model was trained, for the emissions."""
    energy: Assumptions = Assumptions()
    """What energy and emissions are computed with."""


def card(facts: Facts, panels: Sequence[Panel], options: CardOptions) -> list[Block]:
    """The card's blocks, true to what the run's folder says; what nobody but its author knows is to be filled in."""
    spent = energy(facts.device_hours, options.energy)
    return [
        Heading(level=1, text=facts.name),
        *_description(facts),
        *_use(facts),
        *_data(facts),
        *_procedure(facts, spent),
        *_results(facts, panels),
        *distillation(facts),
        *_environment(facts, spent),
        *_citation(facts, options),
        Heading(level=2, text="Licence"),
        Text(text=options.license if options.license != "unknown" else f"{TO_FILL}: give it with --license"),
        *_notes(facts),
    ]


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinity where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def _description(facts: Facts) -> list[Block]:
    model = facts.run.model
    family = "GPT-J" if isinstance(model, GPTJConfig) else "GPT-2"
    shape = facts.parameters
    made_of = lineage.made_of(facts.run)
    from_others = f", {made_of}" if made_of else ""
    text = (
        f"{facts.name} is a {family} language model with {shape.total:,} parameters{from_others}, trained with meshgpt "
        f"{facts.record.get('meshgpt', '')}: a decoder-only transformer that predicts the next token of a text. "
    )
    state = f"{'Here it' if from_others else 'It'} has been trained for {facts.step:,} of {facts.run.last_step:,} steps"
    text += f"{state}, {amount(facts.tokens)} tokens." if facts.finished else f"{state} so far: it is not finished."
    return [
        Heading(level=2, text="Model Description"),
        Text(text=text),
        Text(text=f"What it is meant for and how it differs from others: {TO_FILL}."),
        Table(header=("Hyperparameter", "Value"), rows=_hyperparameters(facts), note=_counting(model)),
    ]


def _hyperparameters(facts: Facts) -> list[tuple[str, str]]:
    model, vocab = facts.run.model, f"{facts.run.model.vocab_size:,}"
    if model.padded_vocab != model.vocab_size:
        vocab += f" (the embedding is padded to {model.padded_vocab:,}; the padding is masked and not exported)"
    rows = [
        ("n_parameters", f"{facts.parameters.total:,}"),
        ("of these in embeddings", f"{facts.parameters.embedding:,}"),
        ("n_layers", f"{model.n_layers}"),
        ("d_model", f"{model.d_model:,}"),
        ("d_ff", f"{model.mlp_width:,}"),
        ("n_heads", f"{model.n_heads}"),
        ("d_head", f"{model.head_size}"),
        ("n_ctx", f"{model.n_positions:,}"),
        ("n_vocab", vocab),
    ]
    if isinstance(model, GPTJConfig):
        rotary = [
            ("Positional Encoding", "Rotary Position Embedding (RoPE)"),
            ("RoPE Dimensions", f"{model.rotary_dim}"),
        ]
        return [*rows, *rotary, *([("Head", "tied")] if model.tied_head else [])]
    details = [("Activation", model.activation)] if model.activation != "gelu_tanh" else []
    details += [("Attention Scores", "divided by the layer's number")] if model.inverse_layer_attention else []
    head = ("Head", "tied" if model.tied_head else "untied")
    return [*rows, ("Positional Encoding", "learned"), head, *details]


def _counting(model: ModelConfig) -> str:
    """How the number of parameters is counted, where a published one differs."""
    lines = flops.explain_parameters(parameter_shapes(model), model.vocab_size).splitlines()
    published = [line for line in lines if "is published with" in line]
    return published[0] if published else "Every number is counted once; padding of the vocabulary is not."


def _not_trained_for(run: Run) -> str:
    """Of this run alone: what other models brought along is not known here."""
    others, text = lineage.others(run), "it was not trained to follow instructions or to be safe"
    return f"here {text} (what {others} was trained for, its own card says)" if others else text


def _use(facts: Facts) -> list[Block]:
    others = lineage.others(facts.run)
    inherited = f", and that of {others}" if others else ""
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "export"  # in the folder of the run, or where `meshgpt export` put it\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        'inputs = tokenizer("Once", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"
    )
    return [
        Heading(level=2, text="Intended Use and Limitations"),
        Text(text=f"The model is best at what it was trained for: going on from a prompt. Intended use: {TO_FILL}."),
        Heading(level=3, text="Out-of-scope use"),
        Text(
            text=f"It is not a product: {_not_trained_for(facts.run)}, and it needs fine-tuning, supervision or "
            f"moderation before people meet it. Out of scope besides: {TO_FILL}."
        ),
        Heading(level=3, text="Limitations and Biases"),
        Text(
            text="It predicts likely words, which need not be true ones, and repeats whatever profanity and prejudice "
            f"its training text has{inherited}. Known of this model and this text: {TO_FILL}."
        ),
        Heading(level=3, text="How to use"),
        Code(language="python", text=code),
    ]


def _data(facts: Facts) -> list[Block]:
    total = sum(source.tokens for source in facts.sources)
    head: list[Block] = [Heading(level=2, text="Training data")]
    others = lineage.others(facts.run)
    here = " in this run" if others else ""
    before: list[Block] = [Text(text=f"What {others} was trained on, its own card says.")] if others else []
    if not total:
        return [*head, Text(text=f"{amount(facts.tokens)} tokens were seen{here}. The text: {TO_FILL}."), *before]
    seen = all(source.seen is not None for source in facts.sources)
    rows = [
        [s.name, f"{s.tokens:,}", f"{s.tokens / total:.1%}", f"{s.documents:,}", f"{s.bytes:,}"]
        + ([f"{s.seen:,}", f"{(s.seen or 0) / max(s.tokens, 1):.2f}"] if seen else [])
        for s in facts.sources
    ]
    text = (
        f"{total:,} tokens of training text, of which the model has seen {facts.tokens:,}{here}: "
        f"{facts.tokens / total:.2f} epochs. Where the text is from and under which licence: {TO_FILL}."
    )
    header = ["Source", "Tokens", "Share", "Documents", "Bytes", *(["Tokens seen", "Epochs"] if seen else [])]
    return [*head, Text(text=text), *before, Table(header=header, rows=rows)]


def _change(change: dict[str, Any]) -> str:
    """What a run was resumed with, in words."""
    return "; ".join(f"{name} {new!r} (was {old!r})" for name, (old, new) in change["changes"].items())


def _procedure(facts: Facts, spent: Energy) -> list[Block]:
    run = facts.run
    per_step = run.global_batch * run.sequence_length
    restarts = f", in {len(facts.sessions)} sessions" if len(facts.sessions) > 1 else ""
    last = " of the last session" if restarts else ""
    hours = "not recorded" if facts.hours is None else f"{facts.hours:.4g} ({duration(facts.hours * 3600)}){restarts}"
    rows = [
        ("Steps", f"{facts.step:,}" + ("" if facts.finished else f" of {run.last_step:,}, in progress")),
        ("Batch", f"{run.global_batch:,} x {run.sequence_length:,} = {per_step:,} tokens"),
        ("Tokens", f"{facts.tokens:,}"),
        ("Tokens per parameter", f"{facts.tokens / facts.parameters.total:.3g}"),
        *([] if isinstance(run.trainable, Full) else [("Trained", f"{run.trainable}, beside {run.init}")]),
        ("Optimizer", _optimizer(run.optim)),
        ("Learning rate", _schedule(run)),
        ("Precision", f"parameters in {run.precision.params}, computing in {_compute(facts)}"),
        *((f"Changed at step {change['step']:,}", _change(change)) for change in facts.record.get("history", [])),
        ("Hardware", facts.hardware or "not recorded"),
        ("Hours", hours),
        *_restarts(facts),
        ("Total FLOs", f"{facts.flops:.3g} ({amount(facts.flops_per_token)} a token: {_flops_rule(run)})"),
        ("Energy", "not known" if spent.kwh is None else f"{spent.kwh:.4g} kWh"),
        ("Last training loss", _number(facts.last("loss"))),
        ("Seed", f"{run.seed}"),
        (f"Software{last}", ", ".join(f"{k} {v}" for k, v in dict(facts.record.get("versions", {})).items())),
        (f"Revision{last}", f"{facts.record.get('git_revision') or 'unknown'}"),
    ]
    notes = [str(note) for note in lineage.origin(facts).get("notes", [])]
    return [
        Heading(level=2, text="Training procedure"),
        Text(text=f"{lineage.beginning(facts)} {lineage.objective(run)}"),
        *([Text(text=f"Of the weights that it began with: {'; '.join(notes)}.")] if notes else []),
        Table(header=("", "Value"), rows=rows),
        Code(language="", text=clean(str(facts.record.get("command", "")))),
    ]


def _restarts(facts: Facts) -> list[tuple[str, str]]:
    """A row of those of `meshgpt launch`, if there were any."""
    if not facts.restarts:
        return []
    goodput = facts.last("goodput")
    share = "" if goodput is None else f", goodput {goodput:.1%} (time of the steps that count, since the last launch)"
    return [("Restarts", f"{facts.restarts:,}{share}")]


def _flops_rule(run: Run) -> str:
    if isinstance(run.trainable, Full):
        rule = "6 per weight of a matmul, and attention"
    else:
        rule = "2 per weight of a matmul forward, the backward pass of what needs one, and attention"
    return f"{rule}; and the teacher's forward pass" if isinstance(run.objective, Distill) else rule


def _compute(facts: Facts) -> str:
    compute = facts.run.precision.compute
    if compute != "auto" or not facts.sessions:
        return compute
    return "float32" if facts.sessions[-1]["device_kind"] == "cpu" else "bfloat16"


def _optimizer(optim: Any) -> str:
    """Every number of the optimizer but those of the learning rate."""
    apart = ("peak_lr", "warmup_steps", "schedule")
    fields = [field.name for field in dataclasses.fields(optim) if field.name not in apart]
    return f"{type(optim).__name__}: " + ", ".join(f"{name} {getattr(optim, name)}" for name in fields)


def _extended(run: Run) -> str:
    if not run.extend:
        return ""
    how = "rewarmed to the peak" if run.extend_schedule == "rewarmed" else "at the rate it ended with"
    return f"; then {run.extend:,} steps more, {how}"


def _schedule(run: Run) -> str:
    optim, schedule = run.optim, run.optim.schedule
    name = type(schedule).__name__
    values = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}
    details = ", ".join(f"{field} {value}" for field, value in values.items() if value is not None)
    warmup = (
        ""
        if isinstance(schedule, Piecewise)
        else f", {fitting_warmup(optim.warmup_steps, run.steps):,} steps of linear warmup"
    )
    return f"peak {optim.peak_lr:g}{warmup}, then {name}" + (f" ({details})" if details else "") + _extended(run)


def _results(facts: Facts, panels: Sequence[Panel]) -> list[Block]:
    blocks: list[Block] = [Heading(level=2, text="Evaluation results"), *_held_out(facts)]
    blocks += references(facts)
    table = by_iteration(facts)
    if table is not None:
        blocks += [Heading(level=3, text="Evaluation by iteration"), table]
    blocks += [Heading(level=3, text="Curves")] if panels else []
    return blocks + [Figure(slug=panel.slug, caption=panel.title) for panel in panels]


def _held_out(facts: Facts) -> list[Block]:
    loss, bits, gzip = (facts.last(key) for key in ("val_loss", "val_bits_per_byte", "gzip_bits_per_byte"))
    if loss is None:
        return [Text(text="No held-out text was evaluated yet.")]
    part, between = facts.measured_part(), held_out_interval(facts.last_row("val_loss"))

    def ends(scaled: Callable[[float], float], form: str) -> str:
        return "" if between is None else " (95%: {} to {})".format(*(f"{scaled(end):{form}}" for end in between))

    rows = [("loss (nats per token)", f"{loss:.4f}{ends(lambda end: end, '.4f')}")]
    rows += [("perplexity per token", f"{perplexity(loss):.2f}{ends(perplexity, '.2f')}")]
    rows += [] if bits is None else [("bits per byte", f"{bits:.4f}{ends(lambda end: end * bits / loss, '.4f')}")]
    rows += [] if gzip is None else [("bits per byte that gzip -9 needs", f"{gzip:.4f}")]
    if part is None:
        return [Table(header=("Held-out text", "Value"), rows=rows)]
    said = "no interval is known" if between is None else "intervals are of resampled batches"
    note = f"A try: measured on {part} of the held-out text; {said}. It is not among the results that the hub shows."
    return [Table(header=(f"Held-out text (a try: {part})", "Value"), rows=rows, note=note)]


def _environment(facts: Facts, spent: Energy) -> list[Block]:
    rows = [
        ("Hardware", facts.hardware or "not recorded"),
        ("Hours", "not recorded" if facts.hours is None else f"{facts.hours:.4g}"),
        ("Energy", "not known" if spent.kwh is None else f"{spent.kwh:.4g} kWh"),
        ("Emissions", "not known" if spent.kg is None else f"{spent.kg:.4g} kg CO2 eq"),
    ]
    return [
        Heading(level=2, text="Environmental impact"),
        Table(header=("", "Value"), rows=rows),
        Text(text="Computed, not metered: device-hours times power times grid intensity."),
        Bullets(items=spent.basis),
    ]


_PAPERS = {
    "GPT-J": "@misc{gpt-j,\n  author = {Wang, Ben and Komatsuzaki, Aran},\n"
    "  title = {{GPT-J-6B: A 6 Billion Parameter Autoregressive Language Model}},\n"
    "  howpublished = {\\url{https://github.com/kingoflolz/mesh-transformer-jax}},\n  year = 2021,\n  month = May\n}",
    "GPT-2": "@techreport{radford2019language,\n"
    "  author = {Radford, Alec and Wu, Jeffrey and Child, Rewon and Luan, David and Amodei, Dario and "
    "Sutskever, Ilya},\n"
    "  title = {Language Models are Unsupervised Multitask Learners},\n  institution = {OpenAI},\n  year = 2019\n}",
}


def _citation(facts: Facts, options: CardOptions) -> list[Block]:
    year = facts.started[:4]
    key = "".join(c for c in facts.name if c.isascii() and c.isalnum()) or "model"
    name, author = (_bibtex(text) for text in (facts.name, options.author or TO_FILL))
    ours = f"@misc{{{key},\n  author = {{{author}}},\n  title = {{{{{name}}}}},\n  year = {year or TO_FILL}\n}}"
    family = "GPT-J" if isinstance(facts.run.model, GPTJConfig) else "GPT-2"
    return [
        Heading(level=2, text="Citation and Related Information"),
        Text(text="To cite this model:"),
        Code(language="bibtex", text=ours),
        Text(text=f"To cite the architecture, {family}:"),
        Code(language="bibtex", text=_PAPERS[family]),
    ]


def _bibtex(text: str) -> str:
    return "".join(c for c in clean(text) if c not in "{}\\@%<>")


def _notes(facts: Facts) -> list[Block]:
    about = "Made by `meshgpt report` from the run's folder.".replace("`", "")
    return [Heading(level=2, text="About this card"), Bullets(items=[about, *facts.notes])]


def _number(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.4f}"
