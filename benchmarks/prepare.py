"""Text to tokens: `meshgpt prepare` beside the raw speed of `tokenizers` and of sentencepiece, on the same text.

    python benchmarks/prepare.py --tokenizer FOLDER [--text FILE...] [--megabytes 24] [--rounds 3] [--json FILE]

Every round runs all of them one after the other, so that whatever else the machine does falls on each; the best round
counts. `tokenizers` and sentencepiece get the documents as a list in memory and keep nothing; `prepare` reads JSON
lines, hashes, splits, tokenizes in worker processes and writes a store; its time includes the start of the workers,
which a large corpus pays once.
"""

import json
import os
import sysconfig
import tempfile
import time
from pathlib import Path

import record

from meshgpt.data.prepare import Prepare, prepare
from meshgpt.data.tokenizer import load_tokenizer, train_sentencepiece


def read_documents(paths: list[Path], size: int) -> list[str]:
    """Documents of some thousand characters, about `size` bytes in all."""
    paths = paths or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    documents, total = [], 0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        pieces = [text[start : start + 4_000] for start in range(0, len(text), 4_000)]
        for piece in pieces:
            if total >= size:
                return documents
            documents.append(piece)
            total += len(piece.encode())
    return documents


def timed_prepare(source: Path, tokenizer: Path, out: Path, workers: int) -> tuple[float, int]:
    """Seconds, the start of the workers included, and tokens."""
    config = Prepare(sources=(str(source),), out=str(out), tokenizer=str(tokenizer), val_fraction=0.0, workers=workers)
    begun = time.perf_counter()
    store = prepare(config, lambda *_: None)
    return time.perf_counter() - begun, store.split("train").num_tokens


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with a tokenizer of `tokenizers`")
    parser.add_argument(
        "--text", type=Path, nargs="*", default=[], help="UTF-8 text; the standard library if not given"
    )
    parser.add_argument("--megabytes", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    asked = parser.parse_args()
    record_of = record.begin("prepare", asked)
    documents = read_documents(asked.text, asked.megabytes << 20)
    size = sum(len(document.encode()) for document in documents)
    print(f"{len(documents):,} documents, {size / 1e6:.1f} MB, {asked.workers} workers, {os.cpu_count()} CPUs")
    best: dict[str, tuple[float, int]] = {}

    def keep(name: str, seconds: float, tokens: int) -> None:
        if name not in best or seconds < best[name][0]:
            best[name] = seconds, tokens

    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "text.jsonl"
        source.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        load_tokenizer(asked.tokenizer).save(Path(scratch) / "bpe")
        pieces = train_sentencepiece(documents[:: max(1, len(documents) // 500)], 8_000)
        pieces.save(Path(scratch) / "pieces")
        from sentencepiece import SentencePieceProcessor
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(Path(scratch) / "bpe" / "tokenizer.json"))
        processor = SentencePieceProcessor(model_file=str(Path(scratch) / "pieces" / "tokenizer.model"))
        for number in range(asked.rounds):
            begun = time.perf_counter()
            tokens = sum(len(encoding.ids) for encoding in backend.encode_batch(documents))
            keep("tokenizers.encode_batch", time.perf_counter() - begun, tokens)
            for name, tokenizer in (("byte-level BPE", "bpe"), ("sentencepiece", "pieces")):
                out = Path(scratch) / f"{tokenizer}-{number}"
                keep(f"meshgpt prepare, {name}", *timed_prepare(source, Path(scratch) / tokenizer, out, asked.workers))
            begun = time.perf_counter()
            tokens = sum(map(len, processor.encode(documents, num_threads=asked.workers)))
            keep("sentencepiece.encode", time.perf_counter() - begun, tokens)
    raw = best["tokenizers.encode_batch"][0]
    rows = [
        {
            "name": name,
            "seconds": seconds,
            "megabytes_per_second": size / seconds / 1e6,
            "tokens_per_second": tokens / seconds,
            "of_encode_batch": raw / seconds,
        }
        for name, (seconds, tokens) in best.items()
    ]
    print(f"{'':32} {'seconds':>8} {'MB/s':>7} {'tokens/s':>12}  of encode_batch's MB/s")
    for row in rows:
        print(
            f"{row['name']:32} {row['seconds']:8.2f} {row['megabytes_per_second']:7.2f} "
            f"{row['tokens_per_second']:12,.0f}  {row['of_encode_batch']:.0%}"
        )
    peers = {name: record.versions_of(name) for name in ("tokenizers", "sentencepiece")}
    record_of.write({"megabytes": size / 1e6, "rows": rows}, peers)


if __name__ == "__main__":
    main()
