"""Every flag explains itself: the docstrings below the fields, in --help and in the configuration reference."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from runs import Here

from meshgpt import flags
from meshgpt.cli import verbs
from meshgpt.distributed import processes

TABLES = {"": verbs.VERBS, "plan ": verbs.PLANS, "data ": verbs.DATA}
WITH_FLAGS = {
    f"{group}{name}": verb for group, table in TABLES.items() for name, verb in table.items() if verb.settings
}
SENTENCE = re.compile(r"[A-Z`].*\.")
VAGUE = re.compile(r"(Of|As|For|In|From|What|How|When|Where)\b.{0,12}\.")


def parts(hint: Any) -> Iterator[type]:
    """The dataclasses that an annotation names."""
    if inspect.isclass(hint) and dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from parts(part)


def settings_of_all_verbs() -> list[type]:
    found = [verbs.named(verb.settings) for verb in WITH_FLAGS.values()]
    for cls in found:
        for hint in typing.get_type_hints(cls).values():
            found += [part for part in parts(hint) if part not in found]
    return list(dict.fromkeys(found))


def not_sentences(texts: dict[str, str]) -> list[str]:
    return [f"{name}: {text!r}" for name, text in texts.items() if not is_sentence(text)]


def is_sentence(text: str) -> bool:
    """Whether it begins with a capital, ends with a full stop, and says more than the field's name does."""
    return bool(SENTENCE.fullmatch(text)) and not VAGUE.fullmatch(text) and len(text.split()) > 2


@pytest.mark.parametrize(
    "text", ["", "steps", "Steps.", "of --serve; 0 takes a free one.", "Of a run.", "Number of steps"]
)
def test_what_is_no_sentence_is_told(text: str):
    assert not is_sentence(text)


@pytest.mark.parametrize("cls", settings_of_all_verbs(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_field_has_a_sentence(cls: type):
    texts = flags.field_help(cls)
    assert not_sentences({field.name: texts.get(field.name, "") for field in dataclasses.fields(cls)}) == []


def test_the_flags_of_several_processes_have_sentences_too():
    assert not_sentences(processes.FLAGS) == []
    assert all(f"--{name.replace('_', '-')}: " in processes.HELP for name in processes.FLAGS)


def test_every_verb_that_takes_flags_is_looked_at():
    """A verb without settings takes no flags: it is a group of verbs, or refuses what stands behind it."""
    assert {name for name, verb in verbs.VERBS.items() if not verb.settings} == {"plan", "data", "doctor"}
    assert all(verb.settings for table in (verbs.PLANS, verbs.DATA) for verb in table.values())


@pytest.mark.parametrize("name", sorted(WITH_FLAGS), ids=str)
def test_help_shows_each_flag_with_its_text_and_default(here: Here, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    if name == "train":
        ended = here.cli("train", "configs/quickstart.py", "--help")
    else:
        ended = here.cli(*name.split(), "--help")
    assert (ended.code, ended.err) == (0, "")
    cls = verbs.named(WITH_FLAGS[name].settings)
    said = " ".join(ended.out.replace("│", " ").split())
    texts = flags.field_help(cls)
    hints = typing.get_type_hints(cls)
    leaves = [field.name for field in dataclasses.fields(cls) if not list(parts(hints[field.name]))]
    assert leaves
    for leaf in leaves:
        assert re.search(re.escape(texts[leaf]) + r" \((default: [^)]*|required)\)", said), leaf


def test_help_of_a_field_comes_from_the_base_class_where_it_has_none(tmp_path, monkeypatch):
    (tmp_path / "bases.py").write_text(
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n"
        '    a: int = 0\n    """The first\n    of A."""\n    b: int = 0\n    """The second of A."""\n'
        "@dataclasses.dataclass\nclass B(A):\n    a: int = 1\n    b: int = 1\n"
        '    """The second of B."""\n    c: int = 0\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    import bases  # pyright: ignore[reportMissingImports]

    assert flags.field_help(bases.B) == {"a": "The first of A.", "b": "The second of B."}
