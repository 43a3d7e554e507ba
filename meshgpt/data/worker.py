"""Worker processes that tokenize blocks, and the pool that keeps them busy and their results in order.

A worker is a plain subprocess that reads its tasks from a pipe and writes results to another. It needs nothing from
the caller's main module (no ``__main__`` guard, no import of jax), shares no memory, and ends when the pipe does, that
is, with its parent, however that dies.
"""

import json
import os
import queue
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

import meshgpt
from meshgpt.data.documents import Block, Document, Rules, document_digest, documents
from meshgpt.data.failures import BadInputError, explain
from meshgpt.data.sources import ReadBlock
from meshgpt.data.tokenizer import Tokenizer, load_tokenizer
from meshgpt.errors import MachineError, UserError

# One row a document. end: tokens of the split up to and including this document; bytes: of its text as UTF-8;
# file and record: where it came from; digest: 128 bits, equal for exact duplicates.
DOCUMENT = np.dtype([("end", "<i8"), ("bytes", "<i8"), ("file", "<u4"), ("record", "<u4"), ("digest", "<u8", (2,))])
SPLITS = ("train", "val")
SHOWN_BAD = 5  # messages about bad records that are kept
_FRAME = struct.Struct("<IQ")  # bytes of the JSON header, bytes of the payload


@dataclass(frozen=True, kw_only=True)
class SplitPart:
    """What a block adds to one split: tokens, rows of `DOCUMENT` whose `end` counts from the block's first token."""

    tokens: bytes
    documents: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What a tokenizer does not give back of documents.

    Attributes:
        unknown: unknown tokens.
        characters: how many do not come back when the tokens are decoded.
        documents: how many (parts of) documents lose some of them or have unknown tokens.
        held_out: how many of these are held out.
    """

    unknown: int = 0
    characters: int = 0
    documents: int = 0
    held_out: int = 0

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


@dataclass(frozen=True, kw_only=True)
class Tokenized:
    """A block's documents as tokens.

    Attributes:
        parts: by split.
        val_text: the held-out documents' text, end to end, as UTF-8.
        replaced: U+FFFD put for invalid bytes.
        replaced_documents: how many documents have any.
        losses: what the tokenizer does not give back.
        bad_records: how many records were skipped.
        first_bad: what was wrong with the first few.
    """

    parts: dict[str, SplitPart]
    val_text: bytes
    replaced: int
    replaced_documents: int
    losses: Losses
    bad_records: int
    first_bad: list[str]


def token_dtype(vocab_size: int) -> np.dtype:
    """Two bytes a token where the vocabulary allows it, else four."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def tokenize(block: Block, tokenizer: Tokenizer, rules: Rules) -> Tokenized:
    """A block's documents as tokens, each document followed by the end-of-text id."""
    bad: list[str] = []
    found = list(_with_text(documents(block, rules, bad), tokenizer, rules, bad, block.spans[0].name))
    continued = block.fragment is not None and not block.fragment.opens
    closes = block.fragment is None or block.fragment.closes
    texts = [document.text for document in found if document.ids is None]
    encoded = iter(tokenizer.encode_batch(texts, continued=continued, parse_special=rules.parse_special))
    ids = [next(encoded) if document.ids is None else list(document.ids) for document in found]
    dtype = token_dtype(tokenizer.vocab_size)
    parts = {}
    for split, held_out in zip(SPLITS, (False, True), strict=True):
        chosen = [i for i, document in enumerate(found) if document.held_out == held_out]
        pieces = [np.array(ids[i] + [tokenizer.eot_id] if closes else ids[i], dtype) for i in chosen]
        rows = _document_rows([found[i] for i in chosen], [len(piece) for piece in pieces])
        parts[split] = SplitPart(tokens=b"".join(piece.tobytes() for piece in pieces), documents=rows)
    return Tokenized(
        parts=parts,
        val_text=b"".join(document.text.encode() for document in found if document.held_out),
        replaced=sum(document.replaced for document in found),
        replaced_documents=sum(document.replaced > 0 for document in found),
        losses=_losses(found, ids, tokenizer, continued),
        bad_records=len(bad),
        first_bad=bad[:SHOWN_BAD],
    )


def _losses(found: list[Document], ids: list[list[int]], tokenizer: Tokenizer, continued: bool) -> Losses:
    total = Losses()
    for document, tokens in zip(found, ids, strict=True):
        if document.ids is not None:  # there was no text that could be lost
            continue
        loss = tokenizer.loss(document.text, tokens, continued=continued)
        if loss.unknown or loss.characters:
            total += Losses(
                unknown=loss.unknown, characters=loss.characters, documents=1, held_out=int(document.held_out)
            )
    return total


def _with_text(
    found: Iterable[Document], tokenizer: Tokenizer, rules: Rules, bad: list[str], name: str
) -> Iterator[Document]:
    """Documents; those of token ids with their text, cut where a text ends, once it is clear that they have one."""
    for document in found:
        if document.ids is None:
            yield document
            continue
        ids = np.array(document.ids, np.int64)
        parts = [part[part != tokenizer.eot_id] for part in np.split(ids, np.flatnonzero(ids == tokenizer.eot_id) + 1)]
        try:
            texts = [tokenizer.decode(part) for part in parts]
        except UserError as error:
            if rules.bad_records == "error":
                raise BadInputError(f"{name}:{document.record}: {error}") from error
            bad.append(f"{name}:{document.record}: {error}")
            continue
        for part, text in zip(parts, texts, strict=True):
            if len(part):
                digest = document_digest()
                digest.update(part.astype("<u4").tobytes())
                yield replace(document, ids=tuple(part.tolist()), text=text, digest=digest.digest())


def _document_rows(found: list[Document], lengths: list[int]) -> np.ndarray:
    rows = np.zeros(len(found), DOCUMENT)
    rows["end"] = np.cumsum(lengths)
    rows["bytes"] = [len(document.text.encode()) for document in found]
    rows["file"] = [document.file for document in found]
    rows["record"] = [document.record for document in found]
    rows["digest"] = np.frombuffer(b"".join(document.digest for document in found), "<u8").reshape(-1, 2)
    return rows


class WorkerPool:
    """`count` worker processes. Use as a context manager: leaving it ends them."""

    def __init__(self, count: int, tokenizer_folder: Path, rules: Rules):
        self._count = count
        self._setup = {"tokenizer": str(tokenizer_folder), "rules": asdict(rules)}
        self._workers: list[subprocess.Popen[bytes]] = []
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="meshgpt-prepare")

    def __enter__(self) -> "WorkerPool":
        package_root = str(Path(meshgpt.__file__).parents[1])
        path = os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
        for _ in range(self._count):
            worker = subprocess.Popen(
                [sys.executable, "-m", "meshgpt.data.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is the parent's to handle
            )
            self._workers.append(worker)
            assert worker.stdin is not None
            _send(worker.stdin, self._setup, [])
            self._idle.put(worker)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.communicate()

    def map(self, blocks: Iterable[ReadBlock]) -> Iterator[tuple[ReadBlock, Tokenized]]:
        """Each block with its tokens, in the order of `blocks`, of which only a few are held at a time."""
        window: deque[tuple[ReadBlock, Future[Tokenized]]] = deque()
        for block in blocks:
            window.append((block, self._threads.submit(self._run, block.block)))
            if len(window) > 2 * self._count:
                done, future = window.popleft()
                yield done, future.result()
        for done, future in window:
            yield done, future.result()

    def _run(self, block: Block) -> Tokenized:
        worker = self._idle.get()
        try:
            assert worker.stdin is not None
            assert worker.stdout is not None
            _send(worker.stdin, block.header(), [block.payload])
            header, payload = _receive(worker.stdout)
        except (EOFError, BrokenPipeError) as error:
            raise MachineError(
                f"a worker process died (exit status {worker.wait()}) while tokenizing {block.spans[0].name}; "
                "if memory ran out, pass fewer --workers. What is done is kept: run the same command again"
            ) from error
        finally:
            self._idle.put(worker)
        if "error" in header:
            raise (MachineError if header["of_machine"] else UserError)(header["error"])
        return _unpack(header, payload)


def main() -> None:
    """A worker's life: a setup message, then a block in and its tokens out until the pipe closes."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not write into the results
    setup, _ = _receive(inbox)
    tokenizer = load_tokenizer(setup["tokenizer"])
    rules = Rules(**setup["rules"])
    while True:
        try:
            header, payload = _receive(inbox)
            _send(outbox, *_answer(Block.from_header(header, payload), tokenizer, rules))
        except (EOFError, BrokenPipeError):
            os._exit(0)  # the parent is gone; closing the pipe in the usual way would raise again


def _answer(block: Block, tokenizer: Tokenizer, rules: Rules) -> tuple[dict, list[bytes]]:
    try:
        return _pack(tokenize(block, tokenizer, rules))
    except Exception as error:  # a worker that dies says nothing
        problem = explain(error, block.spans[0].name)
        return {"error": str(problem), "of_machine": isinstance(problem, MachineError)}, []


def _pack(result: Tokenized) -> tuple[dict, list[bytes]]:
    buffers = [buffer for split in SPLITS for buffer in _buffers(result.parts[split])] + [result.val_text]
    header = {
        "sizes": [len(buffer) for buffer in buffers],
        "replaced": result.replaced,
        "replaced_documents": result.replaced_documents,
        "losses": asdict(result.losses),
        "bad_records": result.bad_records,
        "first_bad": result.first_bad,
    }
    return header, buffers


def _buffers(part: SplitPart) -> tuple[bytes, bytes]:
    return part.tokens, part.documents.tobytes()


def _unpack(header: dict, payload: bytes) -> Tokenized:
    buffers: list[bytes] = []
    offset = 0
    for size in header["sizes"]:
        buffers.append(payload[offset : offset + size])
        offset += size
    parts = {
        split: SplitPart(tokens=buffers[2 * i], documents=np.frombuffer(buffers[2 * i + 1], DOCUMENT))
        for i, split in enumerate(SPLITS)
    }
    return Tokenized(
        parts=parts,
        val_text=buffers[-1],
        replaced=header["replaced"],
        replaced_documents=header["replaced_documents"],
        losses=Losses(**header["losses"]),
        bad_records=header["bad_records"],
        first_bad=header["first_bad"],
    )


def _send(stream: IO[bytes], header: dict, buffers: list[bytes]) -> None:
    encoded = json.dumps(header).encode()
    stream.write(_FRAME.pack(len(encoded), sum(map(len, buffers))))
    stream.write(encoded)
    for buffer in buffers:
        stream.write(buffer)
    stream.flush()


def _receive(stream: IO[bytes]) -> tuple[dict, bytes]:
    header_size, payload_size = _FRAME.unpack(_read(stream, _FRAME.size))
    return json.loads(_read(stream, header_size)), _read(stream, payload_size)


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


if __name__ == "__main__":
    main()
