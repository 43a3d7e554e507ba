"""What README, docs, docstrings and messages name exists: verbs, flags, files, and names in modules."""

import ast
import re
from functools import cache

import pytest
from runs import ROOT

from meshgpt.cli.verbs import PLANS, VERBS

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*"), *ROOT.glob(".github/**/*.md")])
SOURCES = sorted([*ROOT.glob("meshgpt/**/*.py"), *ROOT.glob("configs/*.py")])
# Flags of other programs that the pages call, and of environment files.
FOREIGN = {"--all-files", "--dist", "--upgrade", "--version", "--help", "--cov", "--strict"}
_SUFFIXES = """json jsonl py md txt png html yaml yml npy bin safetensors gguf model zst gz xz parquet toml cff sh lock
tmp sbatch ipynb log npz initialize"""
SUFFIXES = set(_SUFFIXES.split())


def texts() -> list[tuple[str, str]]:
    return [
        (str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in (*PAGES, *SOURCES) if path.is_file()
    ]


def code(text: str) -> list[str]:
    """What stands between backticks, and of a page in its code blocks."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, flags=re.S | re.M)
    indented = re.findall(r"^(?: {4})(meshgpt .*)$", text, flags=re.M) if text.startswith("#") else []
    return [
        *re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text),
        *(line for block in blocks for line in block.splitlines()),
        *indented,
    ]


@cache
def module_names() -> dict[str, set[str]]:
    """What each module (by its last name) defines, imports or has as a field."""
    found: dict[str, set[str]] = {}
    for path in ROOT.glob("meshgpt/**/*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.parent.name if path.stem == "__init__" else path.stem
        names = found.setdefault(name, set())
        for node in ast.walk(tree):
            match node:
                case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                    names.add(node.name)
                case ast.Name(id=word) | ast.arg(arg=word) | ast.alias(name=word) | ast.keyword(arg=str(word)):
                    names.add(word)
                case ast.Attribute(attr=word) | ast.Constant(value=str(word)):
                    names.add(word)
    for path in ROOT.glob("meshgpt/**/*.py"):  # a package has its modules
        found.setdefault(path.parent.name, set()).add(path.stem)
    return found


@cache
def flags() -> set[str]:
    """The last part of every flag: fields of classes, and what is spelt out."""
    known: set[str] = set()
    for path in [*ROOT.glob("meshgpt/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        text = path.read_text(encoding="utf-8")
        fields = [node.target.id for node in ast.walk(ast.parse(text))
                  if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]  # fmt: skip
        known |= {field.replace("_", "-") for field in fields} | {f"no-{field.replace('_', '-')}" for field in fields}
        known |= set(re.findall(r"""(?:["']|^ +)--([a-z][\w-]*)""", text, flags=re.M))  # spelt out, or in a usage
        for other in re.findall(r"OTHER_NAMES: \(([^)]*)\)", text):
            known |= {name.replace("_", "-") for name in re.findall(r"\w+", other)}
        if "processes.py" in path.name:
            known |= {"coordinator", "processes", "process-id", "bind", "deadline"}
    return known


def verb_problems(text: str) -> list[str]:
    found = []
    for piece in code(text):
        for verb, what in re.findall(r"(?:^|(?<!import)[ `(])meshgpt ([a-z][\w-]*)(?: ([a-z]\w*))?", piece):
            known = verb in VERBS or verb == "VERB"
            plan = verb != "plan" or what in PLANS or not what
            found += [] if known and plan else [f"meshgpt {verb} {what}".strip()]
    return found


def flag_problems(text: str) -> list[str]:
    found = []
    for piece in code(text):
        if piece.lstrip().startswith(("pip ", "git ", "gcloud ", "srun", "#SBATCH", "pytest", "python -m pytest")):
            continue
        for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", piece):
            last = flag.rstrip(".-").removeprefix("--").split(".")[-1]
            found += [] if last in flags() or flag in FOREIGN else [flag]
    return found


def file_problems(text: str) -> list[str]:
    folders, kinds = "docs|configs|tests|launch|benchmarks|meshgpt", "py|md|sh|sbatch|yaml|png"
    paths = re.findall(rf"(?<![\w./-])(?:\.\./)?((?:{folders})/[\w./-]+\.(?:{kinds}))\b", text)
    return [path for path in paths if not (ROOT / path).exists() and "*" not in path]


def name_problems(text: str) -> list[str]:
    """`module.name` between backticks, where the package has a module of that name: the module has the name."""
    known, found = module_names(), []
    for module, name in re.findall(r"`(?:meshgpt\.)?(?:\w+\.)*?([a-z_]\w*)\.([A-Za-z_]\w*)(?:\([^`]*\))?`", text):
        if name in SUFFIXES or name in ("org", "com"):
            continue
        package = name in known or module == "meshgpt"  # `meshgpt.models`, and modules of a room
        if module in known and name not in known[module] and not package:
            found.append(f"{module}.{name}")
        if module in GONE:
            found.append(f"{module}.{name}")
    return found


# Modules of before the rooms: nothing may send a reader to them.
GONE = {"scaling", "isolation", "tracker", "hf", "start", "start_state", "distill", "pulse", "pace", "store_writer"}


@pytest.mark.parametrize(("problems", "markdown_only"), [
    (verb_problems, False), (flag_problems, True), (file_problems, False), (name_problems, False)
])  # fmt: skip
def test_what_is_named_exists(problems, markdown_only: bool) -> None:
    found = {
        where: sorted(set(bad))
        for where, text in texts()
        if (where.endswith(".md") or not markdown_only) and (bad := problems(text))
    }
    assert not found


@pytest.mark.parametrize(
    ("problems", "text", "bad"),
    [
        (verb_problems, "run `meshgpt train x` or `meshgpt trian x`, `meshgpt plan memory R`, `meshgpt plan food`",
         ["meshgpt trian x", "meshgpt plan food"]),
        (flag_problems, "`--optim.peak-lr 1` `--optim.peek-lr 1` `--mesh.fsdp`", ["--optim.peek-lr"]),
        (file_problems, "see docs/data.md and docs/gone.md, meshgpt/data/store.py, meshgpt/store.py",
         ["docs/gone.md", "meshgpt/store.py"]),
        (name_problems, "`flops.peak_flops`, `scaling.peak_flops`, `flops.peek_flops`, `run.json`, `jax.jit`",
         ["scaling.peak_flops", "flops.peek_flops"]),
    ],
)  # fmt: skip
def test_the_check_finds_what_does_not_exist(problems, text: str, bad: list[str]) -> None:
    assert problems(text) == bad


def test_the_help_names_every_plan() -> None:
    assert all(re.search(rf"\b{name}\b", VERBS["plan"].summary) for name in PLANS)
