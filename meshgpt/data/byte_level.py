"""Tokenizers of the `tokenizers` library, first of all GPT-2's byte-level BPE."""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from meshgpt.atomic import write_atomically
from meshgpt.data.special_tokens import CONFIG, AddedToken, TokenizerFiles
from meshgpt.data.tokenizer_base import END_OF_TEXT, Definition, Tokenizer
from meshgpt.errors import UserError

if TYPE_CHECKING:
    import tokenizers


@final
class ByteLevelBPE(Tokenizer):
    """A tokenizer of the `tokenizers` library, such as GPT-2's byte-level BPE (Radford et al. 2019, section 2.2).

    Attributes:
        special_ids: the ids that text does not become unless that is asked for.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", stated: TokenizerFiles, source: str):
        backend.no_padding()
        backend.no_truncation()
        self._json = canonical(backend)
        described = json.loads(self._json)
        ids = list(backend.get_vocab(with_added_tokens=True).values())
        self._backend = backend
        self.vocab_size = max(ids, default=-1) + 1
        self.decodable = np.zeros(self.vocab_size, np.bool_)
        self.decodable[ids] = True
        self.fingerprint = hashlib.sha256(self._json.encode()).hexdigest()
        unknown = described["model"].get("unk_token")
        self._unk_id = described["model"].get("unk_id") if unknown is None else backend.token_to_id(unknown)
        self._settle(stated, backend.token_to_id(END_OF_TEXT), source)
        marked = {token["content"]: token["id"] for token in described["added_tokens"] if token["special"]}
        special = self._specials() | {token: i for token, i in marked.items() if i != self._unk_id}
        self.special_ids = frozenset(special.values())
        self._whole = _made(described["model"], special)
        found = {token["content"] for token in described["added_tokens"] if not token["special"]}
        self.withheld = frozenset(token for token, i in special.items() if token in found or i in self._whole)
        self._keeps_all = _keeps_all(described)
        self._special, self._inside_json = special, _beginning_nowhere(described)
        self._plain = _with_special(backend, special, parse=False)

    def encode_batch(
        self, texts: list[str], *, continued: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        if parse_special:
            backend = self._parsing_inside if continued else self._parsing
        else:
            backend = self._plain_inside if continued else self._plain
        found = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        if parse_special or not self._whole:
            return found
        return [
            ids if self._whole.isdisjoint(ids) else self._as_text(text, continued)
            for text, ids in zip(texts, found, strict=True)
        ]

    def _as_text(self, text: str, continued: bool) -> list[int]:
        """Ids of a text of which the model would make special tokens: it is cut inside of each, and encoded in parts.

        One that is a single character cannot be cut and stays, unless it stands for what is unknown.
        """
        ids: list[int] = []
        parts = [(text, continued)]
        while parts:
            part, inside = parts.pop()
            encoding = (self._plain_inside if inside else self._plain).encode(part, add_special_tokens=False)
            spans = [span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i in self._whole]
            cuts = {at for start, stop in spans for at in ((start + 1,) if stop - start > 1 else (start, stop))}
            cuts = sorted(cuts - {0, len(part)})
            if not cuts:
                lost = {self._unk_id} if len(part) == 1 else self._whole
                ids += [i for i in encoding.ids if i not in lost or i not in self._whole]
                continue
            bounds = [0, *cuts, len(part)]
            pieces = [(part[a:b], inside or a > 0) for a, b in itertools.pairwise(bounds)]
            parts += reversed(pieces)
        return ids

    @cached_property
    def _parsing(self) -> "tokenizers.Tokenizer":
        return _with_special(self._backend, self._special, parse=True)

    @cached_property
    def _plain_inside(self) -> "tokenizers.Tokenizer":
        return self._plain if self._inside_json is None else self._inside(parse=False)

    @cached_property
    def _parsing_inside(self) -> "tokenizers.Tokenizer":
        return self._parsing if self._inside_json is None else self._inside(parse=True)

    def _inside(self, *, parse: bool) -> "tokenizers.Tokenizer":
        """One that puts nothing in front of a text."""
        assert self._inside_json is not None
        return _with_special(self._backend.from_str(self._inside_json), self._special, parse=parse)

    def keeps_all(self, text: str) -> bool:
        del text
        return self._keeps_all

    def _decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def _token(self, i: int) -> str:
        return self._backend.id_to_token(i) or ""

    def definition(self) -> Definition:
        return definition_of(json.loads(self._json))

    def to_json(self) -> str:
        """What is in tokenizer.json."""
        return self._json

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "tokenizer.json", self._json)
        unknown = self.eot_id if self._unk_id is None else self._unk_id
        bos, eos, unk = map(self._token, (self.prefix_id, self.eot_id, unknown))
        kind = str(self.stated.files.get(CONFIG, {}).get("tokenizer_class"))
        own = self.stated.prefix_space() is None or _built_by(kind, json.loads(self._json))
        self.stated.write(folder, bos=bos, eos=eos, unk=unk, keep_class=own)


def canonical(backend: "tokenizers.Tokenizer") -> str:
    """One spelling of tokenizer.json, so that equal tokenizers have equal bytes."""
    return json.dumps(json.loads(backend.to_str()), ensure_ascii=False, indent=1, sort_keys=True)


def byte_level(backend: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """`backend` with GPT-2's pre-tokenizer and decoder."""
    from tokenizers import decoders, pre_tokenizers, processors

    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _built_by(kind: str, described: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is what these classes of transformers 5 make of its vocabulary, merges and added tokens.

    They leave its normalizer and pre-tokenizer unread (``GPT2Tokenizer``, ``CodeGenTokenizer``, ``GPTNeoXTokenizer``).
    """
    step = described["pre_tokenizer"] or {}
    normalizer = {"type": "NFC"} if kind.startswith("GPTNeoX") else None
    return (
        described["model"]["type"] == "BPE"
        and not described["model"].get("ignore_merges")
        and described["normalizer"] == normalizer
        and step.get("type") == "ByteLevel"
        and step.get("use_regex", True)
    )


def definition_of(described: dict[str, Any]) -> Definition:
    """Of a tokenizer.json, without what changes no id (offsets, decoders, templates of special tokens)."""
    model = dict(described["model"])
    pieces, merges = model.pop("vocab"), model.pop("merges", [])
    if isinstance(pieces, list):  # unigram: pieces with their scores
        pieces, merges = {piece: i for i, (piece, _) in enumerate(pieces)}, pieces
    added = described["added_tokens"]
    rules = {name: value for name, value in model.items() if value not in (None, "", False)}
    rules["normalizer"], rules["pre-tokenizer"] = described["normalizer"], described["pre_tokenizer"]
    if isinstance(rules["pre-tokenizer"], dict):
        rules["pre-tokenizer"] = {k: v for k, v in rules["pre-tokenizer"].items() if k != "trim_offsets"}
    if "ByteLevel" in json.dumps(rules["pre-tokenizer"]):
        rules.pop("unk_token", None)  # every byte has a piece
    rules["added tokens"] = sorted((t["content"], t["lstrip"], t["rstrip"], t["normalized"], t["single_word"])
                                   for t in added if not t["special"])  # fmt: skip
    return Definition(
        vocabulary=pieces | {token["content"]: token["id"] for token in added},
        special={token["content"] for token in added if token["special"]},
        merges=merges,
        rules=rules,
    )


def load_json(path: Path, stated: TokenizerFiles) -> ByteLevelBPE:
    """The tokenizer of a tokenizer.json.

    Raises:
        UserError: another kind of file.
    """
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for anything it cannot parse
        raise UserError(f"{path} is not a file of the tokenizers library ({error}): name another") from error
    missing = [token for token in stated.added_tokens() if backend.token_to_id(token.content) is None]
    backend = _with_added(backend, missing, stated, str(path))
    if (prefix := stated.prefix_space()) is not None:
        described = json.loads(backend.to_str())
        step = functools.partial(_with_prefix_space, prefix=prefix)
        described["pre_tokenizer"] = _mapped(described["pre_tokenizer"], "pretokenizers", step)
        backend = Backend.from_str(json.dumps(described))
    return ByteLevelBPE(backend, stated, str(path))


def load_vocab_and_merges(folder: Path, stated: TokenizerFiles) -> ByteLevelBPE:
    """The byte-level BPE of a vocab.json and a merges.txt.

    Raises:
        UserError: one is missing, or is something else.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocab, merges):
        if not path.is_file():
            raise UserError(f"{path} is missing: vocab.json and merges.txt belong together")
    try:
        pieces, pairs = models.BPE.read_file(str(vocab), str(merges))
        model = models.BPE(vocab=pieces, merges=pairs)
    except Exception as error:  # the library raises bare Exception for anything it cannot parse
        raise UserError(f"{vocab} and {merges} are not a BPE vocabulary: {error}") from error
    added = stated.added_tokens()
    names = {token.content for token in added}
    named = sorted(({END_OF_TEXT} | stated.special_tokens()) & pieces.keys() - names, key=pieces.__getitem__)
    added += [AddedToken(content=name, id=pieces[name], special=True, normalized=False) for name in named]
    backend = byte_level(Backend(model))
    if stated.files.get(CONFIG, {}).get("add_prefix_space"):
        from tokenizers import pre_tokenizers

        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return ByteLevelBPE(_with_added(backend, added, stated, str(folder)), stated, str(vocab))


def _with_added(
    backend: "tokenizers.Tokenizer", added: Iterable[AddedToken], stated: TokenizerFiles, source: str
) -> "tokenizers.Tokenizer":
    """`backend` with more tokens, each at its id, and with the one that ends texts, where it is named and missing."""
    added = sorted(added, key=lambda token: token.id)
    taken = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
    known = {*taken.values(), *(token.content for token in added)}
    added += stated.appended(known, max([-1, *taken, *(token.id for token in added)]) + 1)
    for token in added:
        if taken.get(token.id, token.content) != token.content:
            raise UserError(
                f"{source}: the added token {token.content!r} has the id {token.id}, which is that of "
                f"{taken[token.id]!r}: correct the one that is wrong"
            )
    described = json.loads(backend.to_str())
    pieces = described["model"]["vocab"]
    if added and isinstance(pieces, dict):
        after = max(taken, default=-1) + 1
        wanted = [token for token in added if backend.token_to_id(token.content) is None]
        if any(token.id != after + i for i, token in enumerate(wanted)):  # ids with holes: only the model can have them
            pieces |= {token.content: token.id for token in wanted}
            backend = backend.from_str(json.dumps(described))
    for token in added:
        _add(backend, token)
    wrong = next((token for token in added if backend.token_to_id(token.content) != token.id), None)
    if wrong is not None:
        raise UserError(f"{source}: the added token {wrong.content!r} cannot have the id {wrong.id} here")
    return backend


def _add(backend: "tokenizers.Tokenizer", token: AddedToken) -> None:
    import tokenizers

    one = tokenizers.AddedToken(
        token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
        normalized=token.normalized, special=token.special,
    )  # fmt: skip
    (backend.add_special_tokens if token.special else backend.add_tokens)([one])


def _with_special(backend: "tokenizers.Tokenizer", special: dict[str, int], *, parse: bool) -> "tokenizers.Tokenizer":
    """A copy in which all of these tokens are special, and text becomes them (`parse`) or never does."""
    copy = backend.from_str(backend.to_str())
    marked = {token.content: token for token in copy.get_added_tokens_decoder().values()}
    for content, i in special.items():
        known = marked.get(content)
        if known is None:
            _add(copy, AddedToken(content=content, id=i, special=True, normalized=False))
        elif not known.special:
            known.special = True
            copy.add_special_tokens([known])
    copy.encode_special_tokens = not parse
    return copy


def _made(model: dict[str, Any], special: dict[str, int]) -> frozenset[int]:
    """Ids of the special tokens that the model itself can give for text, and not only the search for added tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    spell = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
    pieces = model["vocab"]
    if isinstance(pieces, list):
        pieces = {piece for piece, _ in pieces}
    spelled = {i: {token, *(text for text, _ in spell(token))} & set(pieces) for token, i in special.items()}
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
        merged = {left + right for left, right in pairs} | {model.get("unk_token")}
        spelled = {i: {one for one in ways if one in merged or len(one) == 1} for i, ways in spelled.items()}
    return frozenset(i for i, ways in spelled.items() if ways)


def _keeps_all(described: dict[str, Any]) -> bool:
    """Whether any text comes back: bytes as symbols, all of them in the vocabulary, and nothing changed before."""
    from tokenizers.pre_tokenizers import ByteLevel

    model, before = described["model"], described["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    kept = all(
        (step.get("type") == "ByteLevel" and not step.get("add_prefix_space"))
        or step.get("type") == "Digits"
        or (step.get("type") == "Split" and step.get("behavior") != "Removed")
        for step in steps
    )
    letters = set(ByteLevel.alphabet())
    added = [token for token in described["added_tokens"] if not token["special"]]
    strips = any(token["lstrip"] or token["rstrip"] for token in added)
    # The decoder takes an added token of these letters, such as \u00e9, for the bytes that they spell.
    misread = any(set(token["content"]) <= letters and not token["content"].isascii() for token in added)
    return (
        model["type"] == "BPE"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and described["normalizer"] is None
        and (described["decoder"] or {}).get("type") == "ByteLevel"
        and any(step.get("type") == "ByteLevel" for step in steps)
        and kept
        and not strips
        and not misread
        and letters <= model["vocab"].keys()
    )


def _beginning_nowhere(described: dict[str, Any]) -> str | None:
    """The tokenizer.json of a tokenizer that puts nothing in front of a text; None where it does not anyway."""
    inside = described | {
        "normalizer": _mapped(described["normalizer"], "normalizers", _no_prefix_of_normalizer),
        "pre_tokenizer": _mapped(described["pre_tokenizer"], "pretokenizers", _no_prefix_of_pre_tokenizer),
    }
    return None if inside == described else json.dumps(inside)


def _mapped(
    step: dict[str, Any] | None, several: str, change: Callable[[dict[str, Any]], dict[str, Any] | None]
) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer with every step of it changed, or left out for None."""
    if step is None or step["type"] != "Sequence":
        return None if step is None else change(step)
    kept = [one for part in step[several] if (one := _mapped(part, several, change)) is not None]
    return {**step, several: kept} if kept else None


def _no_prefix_of_normalizer(step: dict[str, Any]) -> dict[str, Any] | None:
    if step["type"] == "Prepend":
        return None
    return {**step, "strip_left": False} if step["type"] == "Strip" else step


def _no_prefix_of_pre_tokenizer(step: dict[str, Any]) -> dict[str, Any]:
    if step["type"] == "Metaspace":
        return {**step, "prepend_scheme": "never"}
    return _with_prefix_space(step, prefix=False)


def _with_prefix_space(step: dict[str, Any], *, prefix: bool) -> dict[str, Any]:
    return {**step, "add_prefix_space": prefix} if step["type"] == "ByteLevel" else step
