"""Published figures of other models, to stand beside a run's. None was measured here.

Percentages, except perplexities; keys are (task, metric) in the lm-evaluation-harness's names. Versions of the harness,
accuracy with or without length normalisation, and shots differ between sources: small differences mean nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

GPTJ_CARD = "GPT-J 6B card"
GPT2023_CARD = "GPT2(023) card"

# The columns of each card. The GPT-J card does not say whether accuracy is length-normalised; its HellaSwag of 50.9%
# for GPT-2 1.5B is the normalised one.
_GPTJ = (
    ("lambada_openai", "perplexity"),
    ("lambada_openai", "acc"),
    ("winogrande", "acc"),
    ("hellaswag", "acc_norm"),
    ("piqa", "acc"),
)
_GPT2023 = (
    ("piqa", "acc"),
    ("winogrande", "acc"),
    ("lambada_openai", "perplexity"),
    ("lambada_openai", "acc"),
    ("arc_challenge", "acc"),
    ("sciq", "acc"),
    ("wsc", "acc"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """A published model. figures: as in the module's docstring."""

    name: str
    source: str
    figures: Mapping[tuple[str, str], float]


def _row(name: str, card: Literal["gptj", "gpt2023"], *values: float | None) -> Reference:
    columns, source = (_GPTJ, GPTJ_CARD) if card == "gptj" else (_GPT2023, GPT2023_CARD)
    named = zip(columns, values, strict=True)
    return Reference(name=name, source=source, figures={key: value for key, value in named if value is not None})


REFERENCES = (
    _row("pythia-70m", "gpt2023", 59.85, 51.22, 140.81, 21.40, 17.15, 65.00, 36.53),
    _row("opt-125m", "gpt2023", 63.00, 50.27, 26.02, 37.90, 18.94, 75.1, 36.54),
    _row("gpt2 (124M)", "gpt2023", 62.89, 51.61, 40.06, 32.56, 19.03, 75.0, 43.27),
    _row("gpt2023 (124M)", "gpt2023", 62.02, 49.64, 34.55, 33.98, 18.94, 76.1, 36.54),
    _row("pythia-160m", "gpt2023", 62.68, 51.07, 30.03, 36.76, 19.62, 76.20, 36.58),
    _row("pythia-410m", "gpt2023", 66.54, 52.24, 11.75, 49.93, 21.67, 80.80, 60.58),
    _row("GPT-2 1.5B", "gptj", 10.63, 51.21, 59.4, 50.9, 70.8),
    _row("GPT-Neo 1.3B", "gptj", 7.50, 57.2, 55.0, 48.9, 71.1),
    _row("GPT-Neo 2.7B", "gptj", 5.63, 62.2, 56.5, 55.8, 73.0),
    _row("GPT-J 6B", "gptj", 3.99, 69.7, 65.3, 66.1, 76.5),
    _row("GPT-3 6.7B", "gptj", 4.00, 70.3, 64.5, 67.4, 78.0),
    _row("GPT-3 175B", "gptj", 3.00, 76.2, 70.2, 78.9, 81.0),
)
