"""Text to a token store: ``meshgpt prepare``.

Memory is bounded by the workers, not by the text. Any kill leaves what was committed, and the same command goes on
from there; the store is the same, byte for byte, whatever was interrupted and however many workers there were.
"""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from meshgpt.atomic import rename_folder, write_atomically
from meshgpt.data import encodings, fields, formats, held_out
from meshgpt.data.claim import LOCK, READER, StoreDiffersError, claim
from meshgpt.data.documents import Document, Rules, documents
from meshgpt.data.sources import Listed, Reading, check_unique, list_inputs, read_blocks
from meshgpt.data.store import INDEX, Store, tokenizer_files
from meshgpt.data.tokenizer import Tokenizer, load_tokenizer, train_bpe, train_sentencepiece
from meshgpt.data.unread import Unread, shown
from meshgpt.data.worker import WorkerPool, token_dtype
from meshgpt.data.writer import JOURNAL, Counts, StoreWriter
from meshgpt.errors import UserError, explained
from meshgpt.settings import json_text, settings

__all__ = ["Prepare", "StoreDiffersError", "prepare"]

# Called with what is being done, how much of it is done, and the whole (None where unknown), in bytes.
Progress = Callable[[str, int, int | None], None]

_COMMIT_SECONDS = 2.0
# Settings that requests of before do not have.
_LATER = ("encoding", "parse_special", "split_at", "template", "token_ids")
_FIRST_EXTENSIONS = (".txt", ".md", ".rst", ".jsonl", ".parquet")  # what requests of all times call the default
TEXT_EXTENSIONS = (*_FIRST_EXTENSIONS, *formats.NEW_IN_FOLDERS)


@settings("data.prepare")
class Prepare:
    """What to tokenize, how, and where to."""

    sources: tuple[str, ...]
    """Texts to tokenize: text files, `.jsonl` and `.json` files (all plain, `.gz`, `.bz2`, `.zst` or `.xz`), `.parquet`
    files, `.zip` and `.tar` archives of them, folders and globs of them, also as URLs that fsspec knows;
    `tfds:NAME/SPLIT:FIELD`; `hf:NAME@CONFIG/SPLIT:FIELD`; `-` for standard input; or `stdlib`, the source of the
    running Python's standard library (without its tests). A text file is one document; of the others each line, row or
    record is one."""
    out: str
    """Folder of the store to write."""
    tokenizer: str | None = None
    """Folder or file of a tokenizer to load; give this or train_tokenizer."""
    train_tokenizer: Literal["bpe", "sentencepiece"] | None = None
    """Kind of tokenizer to train on the text (without its held-out part); needs vocab_size."""
    vocab_size: int | None = None
    """Number of ids of the tokenizer that is trained."""
    tokenizer_bytes: int = 64 << 20
    """Number of bytes of text that the tokenizer is trained on, about."""
    val_sources: tuple[str, ...] = ()
    """Texts to hold out for validation, named as `sources` are."""
    val_fraction: float = 0.01
    """Share of the documents of `sources` that is held out, chosen by a hash of their content."""
    field: str = "text"
    """Field of a record of JSON, or column of a `.parquet` file, that holds the text; with dots where it lies within
    others: `doc.text`."""
    token_ids: bool = False
    """Whether `field` holds token ids of the tokenizer in place of text; also reads `.bin` files of ids, nanoGPT's and,
    with an `.idx` beside, Megatron's."""
    template: str | None = None
    """Text made of several fields, in place of `field`, such as `{question}\\n{answer}`: names in braces stand for
    fields, `\\n` for a line break."""
    extensions: tuple[str, ...] = TEXT_EXTENSIONS
    """Which files of a folder are read (compressed ones too), by their endings."""
    on_invalid_utf8: Literal["replace", "error"] = "replace"
    """What to do with bytes that are not UTF-8: `replace` puts U+FFFD for them and counts them, `error` takes the
    record for a bad one."""
    bad_records: Literal["error", "skip"] = "error"
    """What to do with a record that is not valid: `error` stops, `skip` goes on, counts them and shows the first
    few."""
    max_bad_records: int = 0
    """Number of bad records after which skipping stops all the same; 0 sets no limit."""
    encoding: str = "utf-8"
    """Encoding of text and JSON files, by Python's name for it, such as `utf-16`, `latin-1` or `shift_jis`; `detect`
    takes each file's by the byte-order mark at its beginning, and UTF-8 where there is none."""
    split_at: str = ""
    """What separates the documents of a text file, such as `<|endoftext|>`; without it a text file is one document."""
    parse_special: bool = False
    """Take special tokens written in the texts, such as `<|endoftext|>`, for their ids; otherwise they are text."""
    deduplicate: bool = False
    """Drop documents that are equal to an earlier one, byte for byte, at about 100 bytes of memory for each
    document."""
    workers: int = 0
    """Number of processes that tokenize; 0 takes one for each CPU."""
    shard_tokens: int = 1 << 27
    """Number of tokens in a shard of the store."""
    overwrite: bool = False
    """Replace another store that is at `out`."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("no source to prepare: name files, folders, globs, or 'stdlib'")
        if (self.tokenizer is None) == (self.train_tokenizer is None):
            raise UserError("name one tokenizer: either --tokenizer PATH or --train-tokenizer bpe|sentencepiece")
        if self.train_tokenizer is not None and self.vocab_size is None:
            raise UserError("--train-tokenizer needs --vocab-size N (8192 suits a few MB of text, 50257 some GB)")
        if self.tokenizer is not None and self.vocab_size is not None:
            raise UserError(f"--vocab-size {self.vocab_size} goes with --train-tokenizer; a loaded one has its own")
        self._check_fields()
        if not 0.0 <= self.val_fraction < 1.0:
            raise UserError(f"val_fraction {self.val_fraction} must be at least 0 and less than 1")
        for name in ("shard_tokens", "tokenizer_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")
        if self.max_bad_records < 0:
            raise UserError(f"max_bad_records {self.max_bad_records} must be positive, or 0 for no limit")
        if self.max_bad_records and self.bad_records == "error":
            raise UserError(f"max_bad_records {self.max_bad_records} goes with --bad-records skip")
        encodings.check(self.encoding)
        if self.workers < 0:
            raise UserError(f"workers {self.workers} must be at least 1, or 0 for one each CPU")

    def _check_fields(self) -> None:
        if self.token_ids and (self.train_tokenizer or self.template):
            other = "--template" if self.template else "--train-tokenizer"
            raise UserError(f"--token-ids does not go with {other}: ids are of the tokenizer that --tokenizer names")
        if self.template is not None:
            fields.template(self.template)
            if self.field != "text":
                raise UserError(f"--field {self.field!r} and --template {self.template!r}: give one of the two")

    @property
    def _text_of(self) -> str:
        return self.field if self.template is None else fields.template(self.template)

    @property
    def rules(self) -> Rules:
        """How bytes become documents."""
        return Rules(
            field=self._text_of,
            on_invalid_utf8=self.on_invalid_utf8,
            bad_records=self.bad_records,
            val_fraction=self.val_fraction,
            parse_special=self.parse_special,
            token_ids=self.token_ids,
        )

    @property
    def reading(self) -> Reading:
        """How sources are read."""
        return Reading(
            field=self._text_of,
            on_invalid_utf8=self.on_invalid_utf8,
            scratch=Path(self.out),
            token_ids=self.token_ids,
            encoding=self.encoding,
            split_at=self.split_at,
        )


def prepare(config: Prepare, progress: Progress) -> Store:
    """Makes the store that `config` asks for, or what is left of it to make; one that is finished is opened at once.

    Raises:
        UserError: bad input, a folder that holds something else, another prepare at work there, or a full disk.
    """
    unread = Unread()
    kind: dict[str, Any] = {"unread": unread, "out": config.out, "token_ids": config.token_ids}
    inputs = list_inputs(config.sources, config.extensions, **kind)
    inputs += list_inputs(config.val_sources, config.extensions, held_out=True, **kind)
    check_unique(inputs)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            claim(out, _request(config, inputs), _request_of_before(config, inputs), config.overwrite)
            if not (out / INDEX).exists():
                _build(config, inputs, unread, out, progress)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"the disk is full ({out}): free space and run this again; what is done is kept") from error
        raise explained(error, f"cannot write the store {out}: {error}") from error
    return Store.open(out)


def _build(config: Prepare, inputs: list[Listed], unread: Unread, out: Path, progress: Progress) -> None:
    hold_out = held_out.decided(out)
    if hold_out is None and not (out / JOURNAL).exists():
        hold_out = held_out.foreseen(inputs, config.val_fraction)
        if hold_out is not None:
            held_out.decide(out, hold_out)
    rules, reading = config.rules, config.reading
    if hold_out is not None:
        rules, reading = hold_out.rules(rules), replace(reading, tails=hold_out.tails)
    tokenizer = _tokenizer(config, inputs, rules, reading, out / "tokenizer", progress)
    reading = replace(reading, token_bytes=token_dtype(tokenizer.vocab_size).itemsize, eot_id=tokenizer.eot_id)
    writer = StoreWriter(
        out,
        token_dtype(tokenizer.vocab_size),
        config.shard_tokens,
        config.deduplicate,
        held=_held(inputs, rules, reading, progress),
        hold_out=None if hold_out is None else asdict(hold_out),
    )
    total = sum(one.input.size for one in inputs)
    try:
        with WorkerPool(config.workers or _cpus(), out / "tokenizer", rules) as pool:
            committed = time.monotonic()
            for read, result in pool.map(read_blocks(inputs, reading, writer.position)):
                writer.append(read, result)
                _check_bad(config, writer.counts)
                progress("tokenizing", read.size_read, total)
                if time.monotonic() - committed > _COMMIT_SECONDS:
                    writer.commit()
                    committed = time.monotonic()
    except BaseException:
        writer.close()
        raise
    entries = writer.finish(lambda done, whole: progress("gzip -9 of the held-out text", done, whole))
    if not config.val_sources:
        again = held_out.remedy(hold_out, entries["splits"], config.val_fraction, _documents(inputs, rules, reading))
        if again is not None:
            held_out.decide(out, again)
            _build(config, inputs, unread, out, progress)
            return
    _check_splits(config, entries)
    index = _index(config, tokenizer, entries, out)
    if hold_out is not None:
        index["held_out"] = hold_out.said()
    if unread.reasons:
        index["not_read"] = unread.record()
    write_atomically(out / INDEX, json_text(index, indent=1, ensure_ascii=False) + "\n")
    writer.remove_work_files()
    (out / held_out.DECISION).unlink(missing_ok=True)


def _check_bad(config: Prepare, counts: Counts) -> None:
    if config.max_bad_records and counts.bad_records > config.max_bad_records:
        shown = "; ".join(counts.first_bad)
        raise UserError(
            f"{counts.bad_records} bad records are more than --max-bad-records {config.max_bad_records}. "
            f"The first: {shown}"
        )


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _documents(inputs: list[Listed], rules: Rules, reading: Reading) -> Iterator[Document]:
    """All documents, read in this process."""
    for read in read_blocks(inputs, reading):
        yield from documents(read.block, rules, [])


def _held(inputs: list[Listed], rules: Rules, reading: Reading, progress: Progress) -> set[bytes]:
    """Digests of the documents of held-out sources, where there are others that may hold the same text."""
    named = [one for one in inputs if one.held_out]
    found: set[bytes] = set()
    for read in read_blocks(named, reading):
        progress("reading the held-out sources", read.size_read, sum(one.input.size for one in named))
        found.update(document.digest for document in documents(read.block, rules, []))
    return found


def _check_splits(config: Prepare, entries: dict[str, Any]) -> None:
    splits, counts = entries["splits"], entries["counts"]
    train, val = splits["train"]["num_documents"], splits["val"]["num_documents"]
    where = ", ".join(config.sources)
    if train + val == 0 and counts["bad_records"]:
        raise UserError(
            f"{where} holds no text that can be read: all {counts['bad_records']:,} records are bad, the first: "
            f"{counts['first_bad'][0]}"
        )
    if train == 0 and counts.get("in_both"):
        raise UserError(
            f"all {counts['in_both']:,} documents of {where} are in {', '.join(config.val_sources)} too: "
            "name other text to train on, or leave out --val-sources"
        )
    if train + val == 0:
        raise UserError(f"{where} holds no text at all: every file is empty")
    if train == 0:
        raise UserError(f"all {val} documents of {where} were held out: lower --val-fraction {config.val_fraction}")
    if val == 0 and config.val_fraction > 0:
        raise UserError(
            f"none of the {train} documents of {where} can be held out in part or whole: name held-out text with "
            "--val-sources, or pass --val-fraction 0 to go without"
        )


def _index(config: Prepare, tokenizer: Tokenizer, entries: dict[str, Any], out: Path) -> dict[str, Any]:
    kept = asdict(config.rules).items()
    rules = {name: value for name, value in kept if value or name not in ("tails", "parse_special", "token_ids")}
    rules["field"] = config.template or config.field
    sources = [[shown(source) for source in listed] for listed in (config.sources, config.val_sources)]
    return {
        "format": "meshgpt token store",
        "version": 1,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "shard_tokens": config.shard_tokens,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "files": tokenizer_files(out / "tokenizer")},
        **entries,
        "prepare": {**rules, "sources": sources[0], "val_sources": sources[1]},
    }


def _request(config: Prepare, inputs: list[Listed]) -> dict[str, Any]:
    """Everything that the store's content depends on."""
    settings = asdict(config)
    for name in ("out", "workers", "overwrite", "tokenizer"):
        del settings[name]
    for field in dataclasses.fields(config):
        if field.name in _LATER and settings[field.name] == field.default:
            del settings[field.name]
    settings["tokenizer"] = None if config.tokenizer is None else _identity(load_tokenizer(config.tokenizer))
    settings["files"] = [[one.input.name, one.input.size, one.input.version] for one in inputs]
    if config.extensions == TEXT_EXTENSIONS:
        settings["extensions"] = _FIRST_EXTENSIONS  # what the default finds now is in `files`
    for name in ("sources", "val_sources"):
        settings[name] = [shown(source) for source in settings[name]]
    return json.loads(json_text({**settings, READER: 2}))


def _identity(tokenizer: Tokenizer) -> str:
    withheld = f"never in text: {sorted(tokenizer.withheld)}" if tokenizer.withheld else ""
    return ", ".join(filter(None, [tokenizer.fingerprint, tokenizer.ending, withheld]))


def _request_of_before(config: Prepare, inputs: list[Listed]) -> dict[str, Any]:
    """The same as stores had it that were made before requests recorded the reader."""
    request = _request(config, inputs)
    del request[READER]
    files = [[one.input.name, one.input.size, one.input.earlier] for one in inputs if one.input.earlier is not None]
    return {**request, "files": files}


def _tokenizer(
    config: Prepare, inputs: list[Listed], rules: Rules, reading: Reading, folder: Path, progress: Progress
) -> Tokenizer:
    """Loads or trains the tokenizer, once: an interrupted run finds it in `folder`, which appears whole."""
    if folder.exists():
        return load_tokenizer(folder)
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
    else:
        assert config.vocab_size is not None
        train = train_bpe if config.train_tokenizer == "bpe" else train_sentencepiece
        tokenizer = train(_training_texts(config, inputs, rules, reading, progress), config.vocab_size)
    temporary = folder.with_name("tokenizer.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save(temporary)
    rename_folder(temporary, folder)
    return load_tokenizer(folder)


def _training_texts(
    config: Prepare, inputs: list[Listed], rules: Rules, reading: Reading, progress: Progress
) -> Iterator[str]:
    """About `tokenizer_bytes` of the text, in blocks spread evenly over it, without held-out documents."""
    total = sum(one.input.size for one in inputs)
    share = min(1.0, config.tokenizer_bytes / max(1, total))
    taken, left = 1.0 - share, config.tokenizer_bytes  # the first block in any case
    for read in read_blocks(inputs, reading):
        progress("training the tokenizer", read.size_read, total)
        taken += share
        if taken < 1.0:
            continue
        taken -= 1.0
        for document in documents(read.block, rules, []):
            if not document.held_out:
                yield document.text[:left]  # of a source of unknown size all blocks are taken, until it is enough
                left -= len(document.text.encode())
        if left <= 0:
            return


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One prepare a folder; the lock dies with the process."""
    with open(out / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another prepare is at work in {out}: wait for it, or choose another --out") from error
        yield
