"""Tokenizers of the sentencepiece library."""

import hashlib
import itertools
import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from meshgpt.atomic import write_atomically
from meshgpt.data.byte_level import canonical, definition_of
from meshgpt.data.special_tokens import CONFIG, TokenizerFiles
from meshgpt.data.tokenizer_base import Definition, Tokenizer
from meshgpt.errors import UserError

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # sentencepiece's types of pieces
_BPE = 2  # its number of this kind of model
_SPACE = "\u2581"  # how it writes a space


@final
class SentencePiece(Tokenizer):
    """A sentencepiece model (Kudo and Richardson 2018), unigram or BPE, and tokens that were added to it."""

    def __init__(self, model: bytes, stated: TokenizerFiles, source: str):
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"{source} is not a sentencepiece model ({error}): name another file") from error
        self._file = model
        self._model = as_stated(model, stated)
        self._processor.LoadFromSerializedProto(self._model)
        self._proto = _model_proto(self._model)
        pieces = self._processor.vocab_size()
        self._pieces = {piece.piece: i for i, piece in enumerate(self._proto.pieces)}
        self._added = [token for token in stated.added_tokens() if token.content not in self._pieces]
        if any(token.id < pieces for token in self._added):
            wrong = self._added[0]
            raise UserError(
                f"{source} has {pieces:,} pieces, and the files beside it give the added token {wrong.content!r} the "
                f"id {wrong.id:,}, which is one of theirs: take the files of one and the same model"
            )
        known = {*self._pieces, *(token.content for token in self._added)}
        self._added += stated.appended(known, max([pieces - 1, *(token.id for token in self._added)]) + 1)
        self._added_ids = {token.content: token.id for token in self._added}
        self.vocab_size = max([pieces - 1, *self._added_ids.values()]) + 1
        self.decodable = np.zeros(self.vocab_size, np.bool_)
        self.decodable[[*range(pieces), *self._added_ids.values()]] = True
        self._unk_id = self._processor.unk_id()
        # The library decodes these to nothing, so they are written out here.
        self._written = {i: self._processor.IdToPiece(i) for i in range(pieces) if self._processor.IsControl(i)}
        self._written |= {i: token for token, i in self._added_ids.items()}
        if (end := self._processor.eos_id()) >= 0:
            self._written[end] = self._processor.IdToPiece(end)
        added = json.dumps(sorted(self._added_ids.items()), ensure_ascii=False) if self._added else ""
        self.fingerprint = hashlib.sha256(self._model + added.encode()).hexdigest()
        self._settle(stated, end if end >= 0 else None, source, begins=self._processor.bos_id())
        self._special = self._specials()
        self._written |= {i: token for token, i in self._special.items()}
        self._in_text = {i for token, i in self._added_ids.items() if token not in self._special}
        # Text can become one of these: all but the library's own control pieces.
        self._whole = frozenset(i for i in self._special.values() if i < pieces and not self._processor.IsControl(i))
        # The fingerprint has the ids of added tokens, and not which of them are special.
        whole = {token for token, i in self._special.items() if i in self._whole}
        self.withheld = frozenset(whole | {token for token, i in self._added_ids.items() if i not in self._in_text})
        rules = self._proto.normalizer_spec
        self._adds_prefix, self._strips = rules.add_dummy_prefix, rules.remove_extra_whitespaces
        trainer = self._proto.trainer_spec
        changes = rules.precompiled_charsmap or self._strips or trainer.treat_whitespace_as_suffix
        # Pieces that text must not become may take something of it with them; see `_as_text`.
        self._exact = trainer.byte_fallback and rules.escape_whitespaces and not changes and not self._whole

    def encode_batch(
        self, texts: list[str], *, continued: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        in_text = {token: i for token, i in self._added_ids.items() if i in self._in_text}
        in_text |= self._special if parse_special else {}
        if not in_text:
            found = self._encode(texts, continued)
            if not self._whole:
                return found
            return [
                ids if self._whole.isdisjoint(ids) else self._as_text(text, continued)
                for text, ids in zip(texts, found, strict=True)
            ]
        return [self._around(text, in_text, continued, parse_special) for text in texts]

    def _encode(self, texts: list[str], continued: bool) -> list[list[int]]:
        if not continued or not (self._adds_prefix or self._strips):
            return self._processor.encode(texts, num_threads=1)
        # A space in front is what the prefix stands for, and what removing extra ones would take away. Nothing is put
        # in front of an empty text, so a space alone stays one.
        spaced = [text.startswith(" ") and text != " " for text in texts]
        after_space = [text[1:] for text, one in zip(texts, spaced, strict=True) if one]
        others = [text for text, one in zip(texts, spaced, strict=True) if not one]
        with_prefix = iter(self._prefixed.encode(after_space, num_threads=1))
        without = iter(self._bare.encode(others, num_threads=1))
        return [next(with_prefix if one else without) for one in spaced]

    def _around(self, text: str, in_text: dict[str, int], continued: bool, parse_special: bool) -> list[int]:
        """Ids of a text in which some tokens are searched for first, as transformers does."""
        ids: list[int] = []
        for number, part in enumerate(re.split(f"({_any_of(in_text)})", text)):
            if number % 2:
                ids.append(in_text[part])
            elif part:
                (found,) = self._encode([part], continued or number > 0)
                plain = parse_special or self._whole.isdisjoint(found)
                ids += found if plain else self._as_text(part, continued or number > 0)
        return ids

    def _as_text(self, text: str, continued: bool) -> list[int]:
        """Ids of a text in which the model would find special tokens: each is cut behind its first character.

        One that is a single character cannot be cut and stays. What only normalising the text makes to one is left out,
        and so is what is unknown, where that is a special token.
        """
        names = {i: self._token(i).replace(_SPACE, " ") for i in self._whole}
        # Found where they overlap, too: between any two characters of one there is a cut.
        overlapping = re.compile(f"(?=({_any_of(set(names.values()))}))")
        cuts = sorted({match.start() + 1 for match in overlapping.finditer(text)} - {len(text)})
        parts = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
        ids = self._encode(parts[:1], continued)[0] + [i for ids in self._encode(parts[1:], True) for i in ids]
        lost = {i for i, name in names.items() if len(name) > 1 or i == self._unk_id}
        return [i for i in ids if i not in lost]

    def keeps_all(self, text: str) -> bool:
        return self._exact and _SPACE not in text

    def _decode(self, ids: list[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        inside = False  # of a text: its first space is then no prefix, which the library would drop
        for i in [*ids, None]:
            if i is not None and i not in self._written:
                run.append(i)
                continue
            before = self._processor.encode("a") if inside and run else []
            parts.append(self._processor.decode([*before, *run]).removeprefix(self._processor.decode(before)))
            if i is not None:
                parts.append(self._written[i])
                inside = i in self._in_text
            run = []
        return "".join(parts)

    def _id_of(self, token: str) -> int | None:
        return self._added_ids.get(token, self._pieces.get(token))

    def _token(self, i: int) -> str:
        return self._processor.IdToPiece(i) if i < self._processor.vocab_size() else self._written[i]

    def definition(self) -> Definition:
        backend = derived(self._model)
        if backend is not None and not self._added:
            return definition_of(json.loads(canonical(backend)))
        trainer, normalizer = self._proto.trainer_spec, self._proto.normalizer_spec
        pieces = self._proto.pieces
        return Definition(
            vocabulary=self._pieces | self._added_ids,
            special={piece.piece for piece in pieces if piece.type == _CONTROL}
            | {token.content for token in self._added if token.special},
            merges=[(piece.piece, piece.score, piece.type) for piece in pieces if piece.type != _CONTROL],
            rules={
                "model": trainer.model_type,
                "byte fallback": trainer.byte_fallback,
                "whitespace as suffix": trainer.treat_whitespace_as_suffix,
                "normalizer": hashlib.sha256(normalizer.precompiled_charsmap).hexdigest(),
                "prefix of a space": normalizer.add_dummy_prefix,
                "removal of extra spaces": normalizer.remove_extra_whitespaces,
                "escape of spaces": normalizer.escape_whitespaces,
            },
        )

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.model, and tokenizer.json where an exact one exists (BPE models that do not normalise)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "tokenizer.model", self._file)
        backend = None if self._added else derived(self._model)
        if backend is not None:
            write_atomically(folder / "tokenizer.json", canonical(backend))
        if backend is not None or self.stated.folder is not None:
            said = self.stated.files.get("tokenizer_config.json", {})
            added = [] if "added_tokens_decoder" in said else self._added
            bos, eos, unk = map(self._token, (self.prefix_id, self.eot_id, self._processor.unk_id()))
            self.stated.write(folder, bos=bos, eos=eos, unk=unk, added=added)

    @cached_property
    def _prefixed(self) -> "sentencepiece.SentencePieceProcessor":
        return self._processor if self._adds_prefix else self._with_prefix(True)

    @cached_property
    def _bare(self) -> "sentencepiece.SentencePieceProcessor":
        return self._with_prefix(False) if self._adds_prefix else self._processor

    def _with_prefix(self, added: bool) -> "sentencepiece.SentencePieceProcessor":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_proto=_changed(self._model, add_dummy_prefix=added))


def derived(model: bytes) -> "tokenizers.Tokenizer | None":
    """The same tokenizer for the `tokenizers` library, or None where it could differ.

    sentencepiece's BPE merges the adjacent pair whose merged piece scores highest, so the merges are all ways to write
    a piece as two others, in order of its score.
    """
    from tokenizers import AddedToken as Added
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    proto = _model_proto(model)
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type != _BPE or rules.precompiled_charsmap or rules.add_dummy_prefix:
        return None
    if rules.remove_extra_whitespaces or trainer.eos_id < 0:
        return None
    pieces = [piece.piece for piece in proto.pieces]
    mergeable = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
    merges = [
        (-proto.pieces[i].score, mergeable[piece[:k]], mergeable[piece[k:]])
        for piece, i in mergeable.items()
        for k in range(1, len(piece))
        if piece[:k] in mergeable and piece[k:] in mergeable
    ]
    backend = Backend(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[(pieces[left], pieces[right]) for _, left, right in sorted(merges)],
            unk_token=pieces[trainer.unk_id],
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    backend.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    symbols = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    backend.add_tokens([Added(symbol, normalized=False) for symbol in symbols])
    backend.add_special_tokens([Added(pieces[trainer.eos_id], normalized=False)])
    return backend


def _model_proto(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]


def as_stated(model: bytes, stated: TokenizerFiles) -> bytes:
    """A model without the space in front of texts, where tokenizer_config.json says so."""
    none = stated.files.get(CONFIG, {}).get("add_prefix_space") is False
    return _changed(model, add_dummy_prefix=False) if none else model


def _changed(model: bytes, *, add_dummy_prefix: bool) -> bytes:
    proto = _model_proto(model)
    proto.normalizer_spec.add_dummy_prefix = add_dummy_prefix
    return proto.SerializeToString()


def _any_of(tokens: "dict[str, int] | set[str]") -> str:
    """A regular expression of the tokens, the longest first."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
