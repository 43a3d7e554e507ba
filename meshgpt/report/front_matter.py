"""The YAML that opens a model card: what the hub shows and searches, with the results as `model-index`."""

from __future__ import annotations

from typing import Any

from meshgpt.models.model import GPTJConfig
from meshgpt.models.trainable import LoRA
from meshgpt.objectives.distillation import Distill
from meshgpt.report import lineage
from meshgpt.report.blocks import clean
from meshgpt.report.card import CardOptions, perplexity
from meshgpt.report.energy import energy
from meshgpt.report.evals import latest
from meshgpt.report.facts import Facts
from meshgpt.settings import json_text


def front_matter(facts: Facts, options: CardOptions) -> str:
    """The YAML that opens a run's card."""
    spent = energy(facts.device_hours, options.energy)
    fields: dict[str, Any] = {"language": list(options.language)} if options.language else {}
    fields |= {
        "license": options.license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [
            *("meshgpt", "jax", "causal-lm", "gptj" if isinstance(facts.run.model, GPTJConfig) else "gpt2"),
            *(["distillation"] if isinstance(facts.run.objective, Distill) else []),
            *(["lora"] if isinstance(facts.run.trainable, LoRA) else []),
        ],
    }
    base = options.base_model or lineage.base_model(facts)
    if base and facts.run.init:  # of a folder the hub knows no id, and refuses a path
        fields |= {"base_model": base, "base_model_relation": lineage.relation(facts.run)}
    if spent.kg is not None:
        fields["co2_eq_emissions"] = {
            "emissions": round(spent.kg * 1000, 3),  # the hub counts grams
            "source": "power times hours times grid intensity, see the card",
            "training_type": lineage.training_type(facts.run),
            "hardware_used": facts.hardware,
        } | ({"geographical_location": options.location} if options.location else {})
    measured = _model_index(facts)
    if measured:
        fields["model-index"] = [{"name": clean(facts.name), "results": measured}]
    return front_matter_of(fields)


def front_matter_of(fields: dict[str, Any]) -> str:
    """Fields between two lines of dashes. The values are JSON, which YAML reads, so that no text can break out."""
    texts = {key: json_text(_cleaned(value), ensure_ascii=False) for key, value in fields.items()}
    lines = [f"{key}: {text}".replace("<", r"\u003c") for key, text in texts.items()]
    return "\n".join(["---", *lines, "---", ""])


def _cleaned(value: Any) -> Any:
    if isinstance(value, dict):
        return {clean(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) for item in value]
    return clean(value) if isinstance(value, str) else value


def _model_index(facts: Facts) -> list[dict[str, Any]]:
    task = {"type": "text-generation", "name": "Text Generation"}
    results = []
    whole = facts.measured_part() is None  # a try is no result
    loss, bits = (facts.last(key) if whole else None for key in ("val_loss", "val_bits_per_byte"))
    metrics = [] if loss is None else [{"type": "perplexity", "value": perplexity(loss), "name": "token perplexity"}]
    metrics += [] if bits is None else [{"type": "bits_per_byte", "value": bits, "name": "bits per byte"}]
    if metrics:
        held_out = {"type": "held-out", "name": "held-out part of the training text"}
        results.append({"task": task, "dataset": held_out, "metrics": metrics})
    for result in latest(facts.results):
        if result.limited:
            continue
        dataset = {"type": result.task, "name": result.task}
        metric = {"type": result.metric, "value": result.value, "name": result.metric}
        results.append({"task": task, "dataset": dataset, "metrics": [metric]})
    return results
