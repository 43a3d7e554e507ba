"""What every tokenizer does: text to token ids and back, with what begins and ends a text, and what got lost."""

import abc
import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from meshgpt.data.special_tokens import CONFIG, TokenizerFiles
from meshgpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Definition:
    """What decides which ids a text gets.

    vocabulary: id by piece, special tokens included. special: pieces that text is never encoded as. merges: of BPE, in
    order of rank, or the scores of unigram pieces. rules: all other settings, by name.
    """

    vocabulary: dict[str, int]
    special: set[str]
    merges: list[Any]
    rules: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """What a tokenizer does not give back of a text: `unknown` tokens, and `characters` that decoding does not give."""

    unknown: int = 0
    characters: int = 0


class Tokenizer(abc.ABC):
    """Text to token ids and back. Text never becomes a special id, whatever it contains, unless that is asked for.

    Attributes:
        vocab_size: ids are in [0, vocab_size).
        eot_id: the id that ends a document, transformers' `eos_token_id`.
        prefix_id: the id that begins a text, transformers' `bos_token_id`; `eot_id` where there is none.
        stop_ids: the ids that end a generated text: those of the model's generation_config.json or config.json, and
            `eot_id`.
        fingerprint: sha256 (hexadecimal) of the vocabulary and the rules that apply it. Tokenizers that differ only in
            what changes no id, such as offsets, can have different ones: see `tokenizer_difference`.
        ending: what ends documents, where it is not what ends them for this vocabulary by itself; else "".
        withheld: tokens that the vocabulary by itself would find in text, and that are not because the files beside it
            call them special. With the fingerprint and `ending` it decides the ids of texts.
        decodable: bool (vocab_size,), the ids that stand for text. A vocabulary may have holes, and a model may have
            more ids than its tokenizer: generation draws none of these, and `decode` refuses them.
        stated: what the files beside the vocabulary state.
    """

    vocab_size: int
    eot_id: int
    prefix_id: int
    stop_ids: frozenset[int]
    fingerprint: str
    ending: str
    withheld: frozenset[str]
    decodable: np.ndarray
    stated: TokenizerFiles
    _unk_id: int | None

    @abc.abstractmethod
    def encode_batch(
        self, texts: list[str], *, continued: bool = False, parse_special: bool = False
    ) -> list[list[int]]:
        """Ids of each text, without an end-of-text id.

        Args:
            texts: valid Unicode (no lone surrogates).
            continued: the texts carry on where others ended, cut by `blocks.cut_point`: nothing is put in front.
            parse_special: special tokens that are written in the text become their ids.
        """

    @abc.abstractmethod
    def definition(self) -> Definition:
        """What decides its ids, in one form for all kinds of tokenizers; see `tokenizer_difference`."""

    @abc.abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the files that `load_tokenizer(folder)` and transformers' ``AutoTokenizer`` read."""

    @abc.abstractmethod
    def keeps_all(self, text: str) -> bool:
        """Whether it is known, without decoding, that `text` comes back."""

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """`decode` of ids that are all decodable."""

    @abc.abstractmethod
    def _id_of(self, token: str) -> int | None:
        """The id of a token; None for one that the vocabulary does not have."""

    @abc.abstractmethod
    def _token(self, i: int) -> str:
        """The token of an id that the vocabulary has, as the vocabulary spells it."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without an end-of-text id."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, with the end of text and other special ids written out; what is not UTF-8 becomes U+FFFD.

        Raises:
            UserError: an id that stands for no text (see `decodable`).
        """
        listed = np.array([*ids], np.int64)
        known = (listed >= 0) & (listed < self.vocab_size)
        known[known] = self.decodable[listed[known]]
        if not known.all():
            raise UserError(
                f"the token id {listed[~known][0]} stands for no text: the tokenizer has {self.decodable.sum():,} ids, "
                f"from 0 to {self.vocab_size - 1:,}. Decode ids that this tokenizer gave, or leave out the others"
            )
        return self._decode(listed.tolist())

    def loss(self, text: str, ids: list[int], *, continued: bool = False) -> Loss:
        """What `ids`, which `encode_batch` gave for `text`, do not hold of it."""
        if self.keeps_all(text):
            return Loss()
        unknown = 0 if self._unk_id is None else ids.count(self._unk_id)
        # A decoder may drop the space that begins a text, so what carries on is decoded behind something.
        before = self.encode("a") if continued else []
        back = self.decode([*before, *ids]).removeprefix(self.decode(before))
        if back == text:
            return Loss(unknown=unknown)
        return Loss(unknown=unknown, characters=max(1, (Counter(text) - Counter(back)).total()))

    def _settle(self, stated: TokenizerFiles, default: int | None, source: str, begins: int = -1) -> None:
        """Sets what begins and ends texts, and makes known what the folder states.

        Args:
            begins: the id of what begins a text where nothing is stated, such as a sentencepiece model's own; or -1.
            default: the id of what ends documents where nothing is stated: <|endoftext|>, or a sentencepiece model's
                own end of sentence.
        """
        self.stated = stated
        stops = [i for i in stated.end_ids() if self._has(i)]
        named = stated.token("eos_token")
        found = None if named is None else self._id_of(named)
        if found is None and stated.says_none("eos_token"):
            found = stops[0] if stops else default
        elif found is None:
            found = default if default is not None else next(iter(stops), None)
        if found is None:
            raise UserError(
                f"the tokenizer in {source} has no token that ends a text: name one of its tokens as `eos_token` "
                f"in {CONFIG}, or add {END_OF_TEXT!r} to its vocabulary"
            )
        self.eot_id = found
        self.ending = "" if found == default else f"documents end with id {found}"
        self.stop_ids = frozenset([*stops, found])
        begin = stated.token("bos_token")
        first = None if begin is None else self._id_of(begin)
        if first is None and not stated.says_none("bos_token"):
            first = begins if begins >= 0 else self._id_of(END_OF_TEXT) if stated.begins_as_gpt2() else None
        self.prefix_id = found if first is None else first

    def _has(self, i: int) -> bool:
        return 0 <= i < self.vocab_size and bool(self.decodable[i])

    def _specials(self) -> dict[str, int]:
        """The special tokens that the vocabulary has, with their ids; the one for what is unknown only if it is also
        what begins or ends texts: text may well become that."""
        kept = {self.prefix_id, self.eot_id}
        ids = {token: i for token in self.stated.special_tokens() if (i := self._id_of(token)) is not None}
        ids |= {self._token(i): i for i in kept}
        return {token: i for token, i in ids.items() if i != self._unk_id or i in kept}
