"""What a run began with and what it was trained to do, in the words of its card: only what was done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from meshgpt.config import Run
from meshgpt.convert import hub
from meshgpt.models.trainable import LastLayers, LoRA
from meshgpt.objectives.distillation import Distill, chosen_layers
from meshgpt.report.facts import Facts
from meshgpt.training.run_folder import RunFolder


def origin(facts: Facts) -> dict[str, Any]:
    """`init.json` of a run that began with other weights; {} where there is none, or a damaged one."""
    try:
        found = json.loads(RunFolder(facts.folder).origin.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def base_model(facts: Facts) -> str | None:
    """The hub id of the weights that a run began with; None without such weights, and where no id is known."""
    source = facts.run.init
    recorded = origin(facts)
    if not source or "hub" in recorded:
        return recorded.get("hub") if source else None
    return source.partition("@")[0] if hub.is_id(source) and not Path(source).expanduser().exists() else None


def relation(run: Run) -> str:
    """How a run's model stands to the one it began with, as the hub's `base_model_relation` has it."""
    return "adapter" if isinstance(run.trainable, LoRA) else "finetune"


def training_type(run: Run) -> str:
    """Of `co2_eq_emissions`."""
    if run.init:
        return "fine-tuning"
    return "distillation" if isinstance(run.objective, Distill) else "pre-training"


def made_of(run: Run) -> str:
    """The models that this one comes from, for the first sentence of the card; "" for one from random numbers."""
    parts = []
    if run.init:
        how = {LoRA: "adapted (LoRA)", LastLayers: "adapted (its last layers)"}
        parts.append(f"{how.get(type(run.trainable), 'fine-tuned')} from {run.init}")
    if isinstance(run.objective, Distill):
        parts.append(f"distilled from {run.objective.teacher}")
    return " and ".join(parts)


def beginning(facts: Facts) -> str:
    """Where the training began, and what of the model it changed."""
    run = facts.run
    bits = ", kept in 4 or 8 bits" if origin(facts).get("quantized") else ""
    match run.trainable:
        case LoRA(rank=rank, alpha=alpha, targets=targets):
            return (
                f"Low-rank adapters (LoRA, rank {rank}, alpha {alpha:g}, on {', '.join(targets)}) were trained beside "
                f"the weights of {run.init}{bits}, which stayed as they were."
            )
        case LastLayers(layers=layers):
            blocks = "The last block" if layers == 1 else f"The last {layers} blocks"
            return f"{blocks} and the final norm of {run.init} were trained; all else of it{bits} stayed as it was."
        case _ if run.init:
            return f"It started from the weights of {run.init}{bits and ' (dequantized)'}, all of which were trained."
    if isinstance(run.objective, Distill) and run.objective.start == "teacher":
        layers = ", ".join(map(str, chosen_layers(run.objective, run.model.n_layers)))
        return f"It started from layers {layers} of its teacher, counted from 0, and the teacher's embeddings."
    return "It started from random weights."


def objective(run: Run) -> str:
    """What was minimised, with its terms and weights."""
    aim = run.objective
    if not isinstance(aim, Distill):
        text = "It was trained to maximise the likelihood of the next token (cross-entropy)"
        return f"{text}, with a z-loss of weight {aim.z_loss:g}." if aim.z_loss else f"{text}."
    terms = [
        (aim.alpha_ce, f"{aim.temperature**2:g} KL(teacher || student), both at temperature {aim.temperature:g}"),
        (aim.alpha_mlm_or_clm, "the cross-entropy of the next token"),
        (aim.alpha_cos, "(1 - the cosine of both models' last hidden states)"),
    ]
    said = " + ".join(f"{weight:g} x {term}" for weight, term in terms if weight)
    return f"It was distilled from {aim.teacher}: what was minimised, per token, is {said}."


def others(run: Run) -> str:
    """The models whose text and habits this one may have, besides its own training text; "" for none."""
    named = [run.init] if run.init else []
    return " and ".join([*named, run.objective.teacher] if isinstance(run.objective, Distill) else named)
