"""Documents out of text files, a piece at a time, and what is wrong with a file said in words."""

from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["SPLITS", "check_files", "lines", "read_documents"]

SPLITS = ("line", "paragraph", "file")
LONGEST = 64 << 20


def check_files(paths: str | Path | Iterable[str | Path], name: str = "text") -> list[Path]:
    """The files, once each of them exists and holds something.

    Raises:
        ValueError: naming every file that is missing, empty or no file; no files at all; more text
            than there is memory for its tokens.
    """
    paths = [Path(p) for p in ([paths] if isinstance(paths, (str, Path)) else paths)]
    wrong = [] if paths else ["no files are named"]
    for path in paths:
        if not path.exists():
            wrong.append(f"{path} does not exist")
        elif not path.is_file():
            wrong.append(f"{path} is not a file")
        elif path.stat().st_size == 0:
            wrong.append(f"{path} is empty")
    if wrong:
        raise ValueError(f"{name}: {'; '.join(wrong)}")
    size, memory = sum(path.stat().st_size for path in paths), available_memory()
    if memory is not None and size > memory:
        raise ValueError(
            f"{name}: {size / 1e9:.1f} GB of text make about as many bytes of tokens, which are "
            f"held in memory, and {memory / 1e9:.1f} GB are available: train on a part of it"
        )
    return paths


def read_documents(
    paths: str | Path | Iterable[str | Path], documents: str = "line", name: str = "text"
) -> Iterator[str]:
    r"""The documents of UTF-8 files, without empty ones.

    documents: "line", "paragraph" (what empty lines part) or "file". Memory is that of one
    document. `\n` and `\r\n` end lines; a byte order mark is left out.

    Raises:
        ValueError: as check_files, before the first document; for bytes that are not UTF-8, naming
            file, line and byte; for a document of more than 64 MiB.
    """
    if documents not in SPLITS:
        raise ValueError(f"documents must be one of {', '.join(SPLITS)}, got {documents!r}")
    return _documents(check_files(paths, name), documents)


def _documents(paths: list[Path], documents: str) -> Iterator[str]:
    for path in paths:
        held, size = [], 0
        for line in lines(path):
            ends = documents == "line" or (documents == "paragraph" and not line.strip())
            if not ends or documents == "line":
                held.append(line)
                size += len(line)
            if size > LONGEST:
                raise ValueError(
                    f"{path}: a {documents} of more than {LONGEST >> 20} MiB; part the text into "
                    "documents by empty lines (paragraph) or one a line (line)"
                )
            if ends:
                yield from _whole(held)
                held, size = [], 0
        yield from _whole(held)


def _whole(lines: list[str]) -> Iterator[str]:
    text = "\n".join(lines)
    if text.strip():
        yield text


def lines(path: Path) -> Iterator[str]:
    """Its lines without their ends, or a ValueError that names the bytes that are not UTF-8."""
    with path.open("rb") as file:
        number, offset = 0, 0
        while raw := file.readline(LONGEST + 1):
            number += 1
            if len(raw) > LONGEST:
                raise ValueError(f"{path}: line {number} is longer than {LONGEST >> 20} MiB")
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: line {number}: byte 0x{raw[error.start]:02x} at offset "
                    f"{offset + error.start} is not UTF-8 ({error.reason}); convert the file, for "
                    "example by: iconv -f latin1 -t utf-8"
                ) from None
            offset += len(raw)
            line = line.removesuffix("\n").removesuffix("\r")
            yield line.removeprefix("\ufeff") if number == 1 else line


def available_memory() -> int | None:
    """Bytes, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return None
