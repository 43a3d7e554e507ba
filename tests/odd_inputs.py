"""A corpus of small odd inputs, each with what has to come of it: python tests/odd_inputs.py FOLDER

What is expected is said by other programs: Python's json, zipfile, tarfile and codecs, and pyarrow.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import socket
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import zstandard

TEXTS = [
    "plain words",
    'quotes " and \\ and ], } , {',
    "line\nbreaks\r\n",
    "\u00e9\u20ac\U0001f600",
    " spaces ",
    "x" * 300,
]
RECORDS = [{"id": i, "text": text, "meta": {"tags": ["a,]", i], "text": "no"}} for i, text in enumerate(TEXTS)]
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    "": bytes,
}


def lines(end: str = "\n", ascii_only: bool = True) -> bytes:
    """The records as JSON lines."""
    return "".join(json.dumps(record, ensure_ascii=ascii_only) + end for record in RECORDS).encode()


def parquet() -> bytes:
    """The records as a parquet file."""
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), out)
    return out.getvalue()


def archived_zip(files: dict[str, bytes]) -> bytes:
    """A .zip of files."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def archived_tar(files: dict[str, bytes]) -> bytes:
    """A .tar of files, with a folder, a link and a pipe."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.txt", tarfile.SYMTYPE), ("pipe.txt", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            archive.addfile(entry)
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def readable() -> dict[str, tuple[bytes, list[str]]]:
    """Files by name, each with its texts."""
    found: dict[str, tuple[bytes, list[str]]] = {}
    array = json.dumps(RECORDS)
    for compressed, pack in PACK.items():
        found[f"lines.jsonl{compressed}"] = pack(lines()), TEXTS
        found[f"array.json{compressed}"] = pack(array.encode()), TEXTS
        found[f"text.txt{compressed}"] = pack(TEXTS[3].encode()), [TEXTS[3]]
        found[f"Upper.TXT{compressed.upper()}"] = pack(TEXTS[3].encode()), [TEXTS[3]]
        found[f"table.parquet{compressed}"] = pack(parquet()), TEXTS
        found[f"many.tar{compressed}"] = pack(archived_tar(MEMBERS)), MEMBER_TEXTS
    for name in ("a.ndjson", "a.jsonlines", "a.ldjson", "a.json-lines", "A.JSONL", "a.NdJson", "lines.json"):
        found[name] = lines(), TEXTS
    found["no end.ndjson"] = lines().rstrip(b"\n"), TEXTS
    found["crlf.jsonl"] = lines("\r\n"), TEXTS
    found["marked.jsonl"] = b"\xef\xbb\xbf" + lines(ascii_only=False), TEXTS
    found["joined.jsonl"] = (b"\xef\xbb\xbf" + lines()) * 2, TEXTS * 2
    found["marked.json"] = b"\xef\xbb\xbf" + array.encode(), TEXTS
    found["indented.json"] = json.dumps(RECORDS, indent=2).encode(), TEXTS
    found["one.json"] = json.dumps(RECORDS[1], indent=1).encode(), TEXTS[1:2]
    found["one line.json"] = json.dumps(RECORDS[1]).encode(), TEXTS[1:2]
    found["end to end.json"] = b"".join(json.dumps(one, indent=3).encode() for one in RECORDS), TEXTS
    found["none.json"] = b" [ ] ", []
    found["empty.json"] = b"", []
    found["TABLE.PQ"] = parquet(), TEXTS
    found["many.zip"] = archived_zip(MEMBERS), MEMBER_TEXTS
    found["many.tgz"] = gzip.compress(archived_tar(MEMBERS)), MEMBER_TEXTS
    found["many.TBZ2"] = bz2.compress(archived_tar(MEMBERS)), MEMBER_TEXTS
    found["no ending"] = TEXTS[3].encode(), [TEXTS[3]]
    return found


MEMBERS = {
    "../../escape.txt": b"up and away",
    "/absolute.md": b"absolute",
    "in/lines.jsonl": lines(),
    "in/array.JSON.gz": gzip.compress(json.dumps(RECORDS).encode()),
    "in/table.parquet": parquet(),
    "in/long.txt": b"word and word " * 100_000,
    "after.txt": b"after",
    "picture.png": b"\x89PNG\r\n\x1a\n\0\0",
    ".hidden.txt": b"hidden",
    "__MACOSX/a.txt": b"of macOS",
    "inner.zip": b"PK",
}
MEMBER_TEXTS = ["up and away", "absolute", *TEXTS, *TEXTS, *TEXTS, "word and word " * 100_000, "after"]
MEMBERS_NOT_READ = {"picture.png", ".hidden.txt", "__MACOSX/a.txt", "inner.zip"}


def refused() -> dict[str, tuple[bytes, str, list[str]]]:
    """Files by name, each with what has to be said of it and the texts that can be read all the same."""
    noise = random.Random(0).randbytes(3_000)
    second = lines().split(b"\n")[1]
    good = [TEXTS[0], TEXTS[2]]

    def between(line: bytes) -> bytes:
        first, _, third = lines().split(b"\n")[:3]
        return b"\n".join([first, line, third, b""])

    return {
        "noise.txt": (noise, r"noise\.txt is no text but binary.*leave it out", []),
        "wide.txt": ("words".encode("utf-16"), r"wide\.txt is no text but binary \(byte 3 is NUL\).*UTF-16", []),
        "cyrillic.txt": ("слова и буквы".encode("koi8-r") * 5, r"text in another encoding.*--encoding", []),
        "gzip.txt": (gzip.compress(b"words"), r"gzip\.txt is no text but gzip: give it the ending \.gz", []),
        "zip.jsonl": (archived_zip({"a": b"b"}), r"is no text but zip: give it the ending \.zip", []),
        "noise.7z": (b"7z\xbc\xaf\x27\x1c\0\x04" + noise, "is no text but binary", []),
        "digits.jsonl": (between(b'{"text": "a", "n": %s}' % (b"9" * 5_000)), r"jsonl:2 holds a number of more", good),
        "deep.jsonl": (between(b"[" * 100_000), r"deep\.jsonl:2 is not valid JSON", good),
        "broken.jsonl": (between(second[:20]), r"broken\.jsonl:2 is not valid JSON", good),
        "words.jsonl": (between(b"words"), r"words\.jsonl:2 is not valid JSON", good),
        "constant.json": (b"17", r"constant\.json:1 holds a JSON int, not an object", []),
        "comma.json": (b'[{"text": "plain words"},]', r"comma\.json:2 is not valid JSON", TEXTS[:1]),
        "no comma.json": (b'[{"text": "a"} {"text": "b"}]', r"no comma\.json:1 is not valid JSON", []),
        "behind.json": (b'[{"text": "plain words"}] x', "something behind the end of its array", TEXTS[:1]),
        "open.json": (b'[{"text": "plain words"}, {"text":', "its array has no end", TEXTS[:1]),
        "cut.jsonl.gz": (gzip.compress(lines() * 9)[:-9], r"cut\.jsonl\.gz is damaged or cut short", []),
        "cut.jsonl.bz2": (bz2.compress(lines())[:-9], r"cut\.jsonl\.bz2 is damaged or cut short", []),
        "noise.txt.bz2": (noise, r"noise\.txt\.bz2 is damaged or cut short", []),
        "noise.parquet": (noise, r"noise\.parquet is no parquet file, or a damaged one", []),
        "cut.parquet": (parquet()[:-9], r"cut\.parquet is no parquet file, or a damaged one", []),
        "noise.zip": (noise, r"noise\.zip is damaged or cut short", []),
        "noise.tar": (noise, r"noise\.tar is damaged or cut short", []),
        "cut.tgz": (
            gzip.compress(archived_tar({"a.txt": b"a", "b.txt": random.Random(1).randbytes(40_000)}))[:-9_000],
            "damaged or cut short",
            ["a"],
        ),
        "header.tar": (_broken_header(), r"header\.tar is damaged or cut short", ["a"]),
        "sum.zip": (_broken_sum(), r"sum\.zip/a\.txt is damaged or cut short", ["b"]),
    }


def _cut_tar() -> bytes:
    return gzip.compress(archived_tar({"a.txt": b"a", "b.txt": random.Random(1).randbytes(40_000)}))[:-9_000]


def _broken_header() -> bytes:
    data = bytearray(archived_tar({"a.txt": b"a", "b.txt": b"b"}))
    at = data.rindex(b"b.txt")
    data[at : at + 200] = b"?" * 200
    return bytes(data)


def _broken_sum() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", "a" * 100)
        archive.writestr("b.txt", "b")
    return out.getvalue().replace(b"a" * 100, b"a" * 99 + b"?")


def odd_folder(folder: Path) -> dict[str, str]:
    """Makes a folder of what folders may hold; what is not read, by its path below the folder, and why."""
    folder.mkdir()
    (folder / "a.txt").write_text("read")
    (folder / "sub").mkdir()
    (folder / "sub" / "b.TXT").write_text("read too")
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"a name in Latin-1")
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "c.txt").write_text("outside")
    (folder / "linked.txt").symlink_to(outside / "c.txt")
    (folder / "linked").symlink_to(outside)
    (folder / "around").symlink_to(folder)
    (folder / "nowhere.txt").symlink_to(folder / "gone.txt")
    (folder / "itself.txt").symlink_to(folder / "itself.txt")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.open(folder, os.O_RDONLY)  # the whole path may be too long for a socket
        listening.bind(f"/proc/self/fd/{here}/socket.txt")
        os.close(here)
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    deep = str(folder)
    at = os.open(folder, os.O_RDONLY)
    for _ in range(1_500):
        deep += "/d"
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    with open(os.open("deep.txt", os.O_WRONLY | os.O_CREAT, dir_fd=at), "w") as file:
        file.write("deep")
    os.close(at)
    return {
        "linked": "a link to a folder",
        "around": "a link to a folder",
        "nowhere.txt": "a link that leads nowhere",
        "itself.txt": "a link that leads nowhere",
        "pipe.txt": "a pipe, socket or device",
        "socket.txt": "a pipe, socket or device",
        ".hidden.txt": "hidden",
        "picture.png": "another ending",
    }


ODD_FOLDER_TEXTS = ["read", "read too", "a name in Latin-1", "outside", "deep"]


def main(folder: Path) -> None:
    """Writes the corpus."""
    folder.mkdir(parents=True)
    for name, (data, _) in readable().items():
        (folder / name).write_bytes(data)
    for name, (data, _, _) in refused().items():
        (folder / name).write_bytes(data)
    odd_folder(folder / "folder")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
