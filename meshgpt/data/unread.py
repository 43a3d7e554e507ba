"""What was found beside the files that are read, and why it is not read: counted and named."""

import os
from dataclasses import dataclass, field
from typing import Any

NAMED = 5  # names kept of each kind


def shown(name: str) -> str:
    """A file's name as text that can be written: what is not UTF-8 in it as ``\\xe9``."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


@dataclass
class Unread:
    """Counts and first names, by reason."""

    reasons: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, why: str, name: str) -> None:
        """Counts something that is not read."""
        count, names = self.reasons.get(why, (0, []))
        self.reasons[why] = (count + 1, names if len(names) == NAMED else [*names, shown(name)])

    def record(self) -> dict[str, Any]:
        """For the store's index."""
        return {why: {"count": count, "first": names} for why, (count, names) in sorted(self.reasons.items())}


def told(record: dict[str, Any]) -> list[str]:
    """A line for each reason of a `record`."""
    lines = []
    for why, about in record.items():
        names = [*about["first"], "..."] if about["count"] > len(about["first"]) else about["first"]
        lines.append(f"{about['count']:,} not read ({why}): {', '.join(names)}")
    return lines
