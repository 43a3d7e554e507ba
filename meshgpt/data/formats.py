"""What a file's name says about its contents: compression, and what is inside. Case makes no difference."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Literal

Kind = Literal["text", "json_lines", "json", "parquet", "zip", "tar"]

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_KINDS: dict[str, Kind] = {
    ".jsonl": "json_lines",
    ".ndjson": "json_lines",
    ".jsonlines": "json_lines",
    ".json-lines": "json_lines",
    ".ldjson": "json_lines",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".zip": "zip",
    ".tar": "tar",
}
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
NEW_IN_FOLDERS = (".ndjson", ".jsonlines", ".json-lines", ".ldjson", ".pq")  # endings that folders are read by since
_SHORT = {".tgz": ".tar.gz", ".tbz": ".tar.bz2", ".tbz2": ".tar.bz2", ".txz": ".tar.xz", ".tzst": ".tar.zst"}
# What begins like this is no text, whatever its name says; and the ending that it should have had.
_MAGIC = {
    b"\x1f\x8b": ("gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst"),
    b"\xfd7zXZ\x00": ("xz", ".xz"),
    b"BZh91AY&SY": ("bzip2", ".bz2"),
    b"PK\x03\x04": ("zip", ".zip"),
    b"PAR1": ("parquet", ".parquet"),
}
_IDS = "; if it holds token ids, pass --token-ids"
_NUL_BYTES = 8_000  # at the beginning of a file in which a NUL makes it binary, as git has it
_SAMPLE_BYTES = 65_536
_FEW = 16  # bytes: less says nothing
_INVALID_SHARE = 0.25  # of the sample's bytes: Latin-1 prose has 2 to 10%, compressed data about 45%


def spelled_out(name: str) -> str:
    """`name` in lower case, its ending in full: ``A.TGZ`` is ``a.tar.gz``."""
    name = name.lower()
    return next((name.removesuffix(short) + full for short, full in _SHORT.items() if name.endswith(short)), name)


def compression(name: str) -> str:
    """The ending of its compression, such as ``.gz``, or ""."""
    name = spelled_out(name)
    return next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")


def kind_of(name: str) -> Kind:
    """What is inside, by the ending below the compression's; text where that says nothing."""
    inner = spelled_out(name).removesuffix(compression(name))
    return _KINDS.get(PurePosixPath(inner).suffix, "text")


def reading_since(name: str) -> str:
    """What to add to the version of a file that was read otherwise once: the store of then is another one.

    Once upon a time case mattered, and all but ``.jsonl`` and ``.parquet`` was plain text.
    """
    compressed = next((suffix for suffix in (".gz", ".zst", ".xz") if name.endswith(suffix)), "")
    inner = PurePosixPath(name.removesuffix(compressed)).suffix
    before = ({".jsonl": "json_lines", ".parquet": "parquet"}.get(inner, "text"), compressed)
    now = (kind_of(name), compression(name))
    return "" if now == before else f" as {now[0]}{now[1]}"


def has_ending(name: str, endings: Sequence[str]) -> bool:
    """Whether a folder's file is among those asked for, compressed or not."""
    asked = tuple(ending.lower() for ending in endings)
    name = name.lower()
    full = spelled_out(name)
    return any(one.endswith(asked) for one in (name, full, full.removesuffix(compression(name))))


def compression_of(head: bytes) -> str:
    """The ending of the compression of what begins so, or ""."""
    return next((end for magic, (_, end) in _MAGIC.items() if end in COMPRESSED and head.startswith(magic)), "")


def binary(head: bytes, name: str) -> str | None:
    """Why a file that begins with `head` is no text, and the remedy; None where it may be text."""
    for magic, (what, ending) in _MAGIC.items():
        if head.startswith(magic):
            return f"{name} is no text but {what}: give it the ending {ending}, or leave it out"
    at = head.find(b"\0", 0, _NUL_BYTES)
    if at >= 0:
        return (
            f"{name} is no text but binary (byte {at} is NUL): leave it out, or, if it is text in UTF-16 or UTF-32, "
            f"name its encoding with --encoding utf-16{_IDS if name.endswith('.bin') else ''}"
        )
    sample = head[:_SAMPLE_BYTES]
    replaced = sample.decode("utf-8", errors="replace").count("\ufffd") - sample.count("\ufffd".encode())
    if len(sample) >= _FEW and replaced > _INVALID_SHARE * len(sample):
        return (
            f"{name} is no text but binary, or text in another encoding ({replaced:,} of its first {len(sample):,} "
            "bytes are not UTF-8): leave it out, or name its encoding with --encoding"
        )
    return None
