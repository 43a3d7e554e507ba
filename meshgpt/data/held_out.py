"""What is held out where the hash of their content would hold out none of a few documents, or all: a part all the same.

Of less than ten documents the tails are held out, of more the one whose hash is lowest. A folder's `held_out.json` says
which, so that an interrupted `prepare` goes on in the same way.
"""

import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from meshgpt.atomic import write_atomically
from meshgpt.data import text_files
from meshgpt.data.documents import Document, Rules, split_hash
from meshgpt.data.sources import Listed
from meshgpt.data.writer import JOURNAL
from meshgpt.settings import json_text

DECISION = "held_out.json"
_FEW = 10  # documents
_KEPT = ("request.json", "prepare.lock", DECISION)


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """How much is held out: a share of the documents, by hash, or the tail of each."""

    val_fraction: float
    tails: float = 0.0

    def rules(self, rules: Rules) -> Rules:
        """`rules` with this."""
        return replace(rules, val_fraction=self.val_fraction, tails=self.tails)

    def said(self) -> str:
        """What to tell of it."""
        if self.tails:
            return f"the last {self.tails:.3g} of each document, whole lines of it (words, of one long line)"
        return "the one document whose hash is lowest"


def decided(out: Path) -> HoldOut | None:
    """What was decided for this folder, if anything had to be; work begun before the decision is thrown away."""
    path = out / DECISION
    if not path.exists():
        return None
    decision = json.loads(path.read_text(encoding="utf-8"))
    journal = out / JOURNAL
    if journal.exists() and json.loads(journal.read_text(encoding="utf-8")).get("hold_out") != decision:
        for child in out.iterdir():
            if child.name not in (*_KEPT, JOURNAL):
                shutil.rmtree(child) if child.is_dir() else child.unlink()
        journal.unlink()  # last, so that a kill on the way leaves what says that there is work to throw away
    return HoldOut(**decision)


def decide(out: Path, hold_out: HoldOut) -> None:
    """Has the folder's work begin anew with this."""
    write_atomically(out / DECISION, json_text(asdict(hold_out)))


def foreseen(inputs: list[Listed], val_fraction: float) -> HoldOut | None:
    """What will have to be decided, where a look at the beginnings of the sources says so."""
    texts = [one.input for one in inputs if isinstance(one.input, text_files.Text) and one.input.one_document]
    if any(one.held_out for one in inputs):
        return None
    if not val_fraction or len(texts) != len(inputs) or len(texts) >= _FEW:
        return None
    heads = [head for text in texts if (head := text.head())]
    below = sum(split_hash(head) < val_fraction for head in heads)
    return HoldOut(val_fraction=0.0, tails=val_fraction) if heads and below in (0, len(heads)) else None


def remedy(
    before: HoldOut | None, splits: dict[str, Any], val_fraction: float, documents: Iterable[Document]
) -> HoldOut | None:
    """What to decide for a store with an empty split; None where nothing helps.

    Args:
        before: what was decided before.
        documents: all of them, read anew.
    """
    counts = splits["train"]["num_documents"], splits["val"]["num_documents"]
    if not val_fraction or 0 not in counts or not any(counts):
        return None
    if before is None and sum(counts) < _FEW:
        return HoldOut(val_fraction=0.0, tails=val_fraction)
    if (before is not None and not before.tails) or counts[0] < 2:
        return None
    lowest = min(document.split_hash for document in documents)
    return HoldOut(val_fraction=math.nextafter(lowest, 1.0))
