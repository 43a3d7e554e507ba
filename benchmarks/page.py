"""The figures of docs/*.md from benchmarks/results: what stands between two comments there is written by this.

    python benchmarks/page.py            # rewrites the blocks
    python benchmarks/page.py --check    # says which block is not what its result gives, and exits with 1

A block begins with a line `<!-- results/NAME.json -->`, which names a file that a benchmark wrote with `--json`, and
ends with a line `<!-- end -->`. In between come its table (blocks.py) and where it was measured; all else is prose.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import blocks

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
BEGIN = re.compile(r"<!-- (results/.*?) -->")
END = "<!-- end -->"


class PageError(Exception):
    """A document or a result that cannot be used; the message names it and the remedy."""


def rendered(text: str, folder: Path) -> str:
    """A document's text with its blocks as the files below `folder` give them."""
    lines, name = [], ""
    for line in text.splitlines():
        begins = BEGIN.fullmatch(line.strip())
        if begins and name:
            raise PageError(f"{name}: its block has no {END} before the one of {begins[1]}")
        if begins:
            name = begins[1]
            lines += [line, block(name, folder)]
        elif line.strip() == END:
            if not name:
                raise PageError(f"{END} without a block before it")
            name = ""
        if not name:
            lines.append(line)
    if name:
        raise PageError(f"{name}: its block has no {END}")
    return "\n".join(lines) + "\n"


def stale(text: str, folder: Path) -> list[str]:
    """The blocks that are not what their results give."""
    if text == (wanted := rendered(text, folder)):
        return []
    pairs = zip(_blocks(text), _blocks(wanted), strict=True)
    return [name for (name, stands), (_, belongs) in pairs if stands != belongs] or ["the end of the file"]


def block(name: str, folder: Path) -> str:
    """What stands below the line that names a result."""
    result = _read(name, folder)
    kind = str(result.get("benchmark"))
    renderer = blocks.RENDERERS.get(kind)
    if renderer is None:
        raise PageError(f"{name}: no table is known for benchmark {kind!r}; add it to blocks.py")
    try:
        return f"\n{renderer(result['figures'], result['arguments'])}\n\n{provenance(result)}\n"
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise PageError(f"{name}: not what {kind}.py --json writes ({error!r}); measure it again") from error


def provenance(result: dict[str, Any]) -> str:
    """Where figures come from: machine, versions, date, commit and command."""
    machine, versions = result["machine"], result["versions"]
    where = [machine["accelerator"]] if machine["accelerator"] else []
    where += [f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"]
    load = ", ".join(f"{one:.1f}" for one in result["load"])
    made_of = [", ".join(f"{package} {version}" for package, version in versions.items())]
    groups: dict[str, list[str]] = {}
    for peer, packages in result["peers"].items():
        of = ", ".join(f"{package} {v}" for package, v in packages.items() if (package, v) not in versions.items())
        groups.setdefault(of, []).append(peer)
    made_of += [f"{of} ({'; '.join(names)})" for of, names in groups.items()]
    changed = f" and changes to {len(result['changed'])} files" if result["changed"] else ""
    commit = f"commit {result['commit'][:10]}{changed}" if result["commit"] else "no commit"
    settings = "".join(f"{name}={value} " for name, value in result["environment"].items())
    return (
        f"Measured {result['date'][:10]} on {'; '.join(where)} (load as it began {load}), {commit}, "
        f"{'; '.join(made_of)}:\n`{settings}{result['command']}`"
    )


def _read(name: str, folder: Path) -> dict[str, Any]:
    if not re.fullmatch(r"results/[A-Za-z0-9_-]+\.json", name):
        raise PageError(f"{name}: not the name of a result, which is results/NAME.json")
    path = folder / name
    if not path.is_file():
        there = sorted(f"results/{one.name}" for one in (folder / "results").glob("*.json"))
        raise PageError(f"{name}: there is no such file in {folder}; there are {', '.join(there) or 'none'}")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PageError(f"{name}: not JSON ({error}); write it again with a benchmark's --json") from error
    if not isinstance(result, dict):
        raise PageError(f"{name}: not what a benchmark's --json writes; write it again")
    return result


def _blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(rf"^<!-- (results/.*?) -->$(.*?)^{END}$", text, re.MULTILINE | re.DOTALL)


def main(words: list[str] | None = None, docs: Path = DOCS, folder: Path = HERE) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, code = parser.parse_args(words).check, 0
    for path in sorted(docs.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        try:
            names = stale(text, folder)
        except PageError as why:
            print(f"{path.name}: {why}", file=sys.stderr)
            code = 1
            continue
        for name in names:
            word = "is not what it gives; run `python benchmarks/page.py`" if check else "written"
            print(f"{path.name}: the block of {name} {word}", file=sys.stderr)
        if names and check:
            code = 1
        elif names:
            path.write_text(rendered(text, folder), encoding="utf-8")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
