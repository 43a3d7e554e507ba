"""What the files beside a vocabulary state: which tokens begin, end and pad texts, added tokens, and chat templates.

A model's folder says this in up to seven places (tokenizer_config.json, special_tokens_map.json, added_tokens.json,
config.json, generation_config.json, chat_template.jinja, additional_chat_templates/). They are read as transformers'
`AutoTokenizer` and `GenerationConfig` read them, kept as they are, and written again beside every copy.
"""

import dataclasses
import json
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from meshgpt.atomic import write_atomically
from meshgpt.errors import UserError
from meshgpt.settings import json_text

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
GENERATION = "generation_config.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
TEMPLATES = "additional_chat_templates"
IDS = "special_ids.json"  # the special ids of config.json, in a folder that holds a tokenizer and no model

_MODEL = "config.json"
_ID_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE = ("additional_special_tokens", "extra_special_tokens")
# Classes of transformers whose texts begin and end with <|endoftext|> where their files do not say otherwise.
_GPT2_LIKE = ("GPT2", "CodeGen", "GPTNeoX")
_DEFAULT = "<|endoftext|>"
_CLASS, _FAST = "tokenizer_class", "PreTrainedTokenizerFast"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token beside those that the model of the tokenizer makes: the fields of `tokenizers.AddedToken`, and its id."""

    content: str
    id: int
    special: bool
    normalized: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """The files beside a tokenizer's vocabulary.

    Attributes:
        folder: where they were read; None for a tokenizer that was trained here.
        files: the contents of those JSON files that are there, by name.
        ids: `bos_token_id`, `eos_token_id` and `pad_token_id` of the model's config.json, as far as they stand there.
        templates: chat templates as text, by the name of their file in the folder.
    """

    folder: Path | None = None
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    ids: dict[str, Any] = dataclasses.field(default_factory=dict)
    templates: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "TokenizerFiles":
        """What the files in `folder` state.

        Raises:
            UserError: one of them is not JSON, or not an object.
        """
        found = {name: _read(folder / name) for name in (CONFIG, SPECIAL, GENERATION, ADDED)}
        model = _read(folder / IDS)
        model = _read(folder / _MODEL) if model is None else model
        templates = [folder / TEMPLATE, *sorted((folder / TEMPLATES).glob("*.jinja"))]
        return cls(
            folder=folder,
            files={name: content for name, content in found.items() if content is not None},
            ids={name: model[name] for name in _ID_NAMES if name in model} if model else {},
            templates={
                path.relative_to(folder).as_posix(): path.read_bytes().decode("utf-8", errors="replace")
                for path in templates
                if path.is_file()
            },
        )

    def token(self, role: str) -> str | None:
        """The token of a role such as "eos_token"; None where no file names one, or one says null.

        Files with `added_tokens_decoder` in their tokenizer_config.json are of a transformers that takes it alone;
        in older ones special_tokens_map.json comes first.
        """
        values = self._values(role)
        if values and values[0] is None and role in self.files.get(SPECIAL, {}) and not self._decoder_counts():
            return None  # special_tokens_map.json comes first, and says that there is none
        return next((text for text in map(_content, values) if text is not None), None)

    def says_none(self, role: str) -> bool:
        """Whether a file gives null for a role, and none gives a token."""
        return bool(self._values(role)) and self.token(role) is None

    def begins_as_gpt2(self) -> bool:
        """Whether the class of transformers that reads these files lets texts begin with <|endoftext|> by default."""
        kind = self.files.get(CONFIG, {}).get(_CLASS)
        return kind is None or str(kind).startswith(_GPT2_LIKE)

    def prefix_space(self) -> bool | None:
        """Whether a space is put in front of every text, where transformers lets tokenizer_config.json decide this and
        not tokenizer.json: for the classes of GPT-2, GPT-J and GPT-NeoX, in which a missing value is False."""
        config = self.files.get(CONFIG, {})
        kind = config.get(_CLASS)
        return bool(config.get("add_prefix_space")) if kind and str(kind).startswith(_GPT2_LIKE) else None

    def special_tokens(self) -> set[str]:
        """All tokens that the files call special, whatever for."""
        return self._named() | {one.content for one in self.added_tokens() if one.special}

    def _named(self) -> set[str]:
        """The tokens that have a role, or are listed as special."""
        found = {self.token(role) for role in _ROLES}
        for name in (CONFIG, SPECIAL):
            content = self.files.get(name, {})
            for key in _MORE:
                listed = content.get(key) or []
                found |= {_content(one) for one in (listed.values() if isinstance(listed, dict) else listed)}
            found |= {_content(value) for key, value in content.items() if key.endswith("_token")}
        return {token for token in found if token}

    def added_tokens(self) -> list[AddedToken]:
        """The tokens of `added_tokens_decoder`, or of added_tokens.json where that is missing, in order of their ids.

        Raises:
            UserError: an id that is not a number.
        """
        decoder = self.files.get(CONFIG, {}).get("added_tokens_decoder")
        try:
            if decoder is not None:
                found = [_added(int(number), flags) for number, flags in decoder.items()]
            else:
                named = self._named()
                found = [
                    AddedToken(
                        content=content, id=int(number), special=content in named, normalized=content not in named
                    )
                    for content, number in self.files.get(ADDED, {}).items()
                ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"the added tokens of {self.folder} are not tokens with their ids: {error!r}") from error
        return sorted(found, key=lambda one: one.id)

    def appended(self, known: Container[str], after: int) -> list[AddedToken]:
        """Where the vocabulary lacks the `eos_token` that is named: this token, and a `bos_token` that it lacks, too.

        Args:
            known: the vocabulary, with all tokens that were added.
            after: the first id behind it. As in transformers the tokens have the ids from there on.
        """
        end, begin = self.token("eos_token"), self.token("bos_token")
        if end is None or end in known:
            return []
        if self.prefix_space() is not None and not self._values("bos_token"):
            begin = _DEFAULT
        lacking = dict.fromkeys(token for token in (begin, end) if token is not None and token not in known)
        return [
            AddedToken(content=token, id=after + number, special=True, normalized=False)
            for number, token in enumerate(lacking)
        ]

    def end_ids(self) -> list[int]:
        """Ids that end a generated text: of generation_config.json, else of config.json; both may list several."""
        for content in (self.files.get(GENERATION, {}), self.ids):
            if (found := _numbers(content.get("eos_token_id"))) or "eos_token_id" in content:
                return found
        return []

    def model_ids(self, eot_id: int, prefix_id: int, vocab_size: int) -> dict[str, Any]:
        """The special ids for config.json of a model of `vocab_size` ids: those stated, as far as it has them."""

        def has(value: Any) -> bool:
            return value is None or all(0 <= number < vocab_size for number in _numbers(value))

        stated = {name: value for name, value in self.ids.items() if has(value)}
        return {"bos_token_id": prefix_id, "eos_token_id": eot_id} | stated

    def generation(self, ids: dict[str, Any]) -> dict[str, Any]:
        """generation_config.json: as it was, or of a model with these special ids."""
        return self.files.get(GENERATION) or {"_from_model_config": True, **ids}

    def write(
        self,
        folder: Path,
        *,
        bos: str,
        eos: str,
        unk: str | None,
        added: Iterable[AddedToken] = (),
        keep_class: bool = True,
    ) -> None:
        """Writes the files that `AutoTokenizer` reads beside a vocabulary; what they do not state comes from here.

        Args:
            bos: begins a text; `eos` ends one; `unk` stands for what is unknown.
            added: tokens that no other file of the folder holds.
            keep_class: whether the class that tokenizer_config.json names gives the ids of tokenizer.json. If not,
                `PreTrainedTokenizerFast` is named, which takes that file as it is.
        """
        config = self.files.get(CONFIG, {})
        if not keep_class:
            config = {key: value for key, value in config.items() if key != _CLASS}
        if _CLASS not in config:  # then a class decided what the files do not say: say it
            said = {_CLASS: _FAST, "clean_up_tokenization_spaces": False}
            roles = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
            config = said | {role: token for role, token in roles.items() if not self._values(role)} | config
        _write(folder / CONFIG, config)
        special = self.files.get(SPECIAL)
        if special is None and CONFIG not in self.files:
            special = {"bos_token": bos, "eos_token": eos, "unk_token": unk}
        if special is not None:
            _write(folder / SPECIAL, special)
        if GENERATION in self.files:
            _write(folder / GENERATION, self.files[GENERATION])
        if self.ids and not (folder / _MODEL).exists():
            _write(folder / IDS, self.ids)
        if rest := {one.content: one.id for one in added}:
            _write(folder / ADDED, rest)
        for name, text in self.templates.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_atomically(folder / name, text)

    def chat_templates(self) -> dict[str, str]:
        """Chat templates by name; "default" is used where none is named. Files go before tokenizer_config.json."""
        said = self.files.get(CONFIG, {}).get("chat_template")
        listed = said if isinstance(said, list) else [{"name": "default", "template": said}]
        found = {one.get("name"): one.get("template") for one in listed if isinstance(one, dict)}
        found |= {"default" if path == TEMPLATE else Path(path).stem: text for path, text in self.templates.items()}
        return {name: text for name, text in found.items() if isinstance(name, str) and isinstance(text, str)}

    def _values(self, role: str) -> list[Any]:
        """What the files give for a role, first the one that counts."""
        config, special = self.files.get(CONFIG, {}), self.files.get(SPECIAL, {})
        order = (config, special) if self._decoder_counts() else (special, config)
        return [content[role] for content in order if role in content]

    def _decoder_counts(self) -> bool:
        return "added_tokens_decoder" in self.files.get(CONFIG, {})


def check_carried(source: Path, copy: Path, vocab_size: int | None = None) -> None:
    """Holds the files beside a saved tokenizer against those in the folder that it came from.

    Args:
        vocab_size: of the model in `copy`: special ids that it does not have need not be there.

    Raises:
        UserError: naming the first thing that the copy lacks, or says otherwise.
    """
    before, after = TokenizerFiles.read(source), TokenizerFiles.read(copy)
    for name in (CONFIG, SPECIAL, GENERATION):
        for key, value in before.files.get(name, {}).items():
            kept = after.files.get(name, {})
            if key == _CLASS and kept.get(key) == _FAST:
                continue
            if key not in kept or json_text(kept[key]) != json_text(value):
                raise UserError(f"{copy / name} does not carry {key!r} of {source / name} on; not written")
    for name, value in before.ids.items():
        known = vocab_size is None or all(0 <= number < vocab_size for number in _numbers(value))
        if known and after.ids.get(name, _MISSING) != value:
            raise UserError(f"{copy} does not carry {name} = {value} of {source} on; not written")
    for name, text in before.templates.items():
        if after.templates.get(name) != text:
            raise UserError(f"{copy / name} is not the chat template of {source / name}; not written")


_MISSING = object()


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): mend it, or remove it to go on without it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object: mend it, or remove it to go on without it")
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json_text(content, indent=1, ensure_ascii=False)
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # half of a pair, which only an escape can spell
        text = json_text(content, indent=1)
    write_atomically(path, text + "\n")


def _content(token: Any) -> str | None:
    """Of a token as text, or as the fields of an AddedToken."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _added(number: int, flags: dict[str, Any]) -> AddedToken:
    special = bool(flags.get("special", False))
    names = ("lstrip", "rstrip", "single_word")
    return AddedToken(
        content=flags["content"],
        id=number,
        special=special,
        normalized=bool(flags.get("normalized", not special)),
        **{name: bool(flags.get(name, False)) for name in names},
    )


def _numbers(value: Any) -> list[int]:
    """An id or a list of ids as a list; what is no id is left out."""
    listed = value if isinstance(value, list) else [value]
    return [one for one in listed if isinstance(one, int) and not isinstance(one, bool)]
