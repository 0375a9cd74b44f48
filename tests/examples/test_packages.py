"""Archives are checked before they are unpacked; verses are read as SWORD wrote them."""

import hashlib
import io
import struct
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest


@pytest.fixture
def packages(example, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return example("packages")


@pytest.fixture
def downloaded(monkeypatch):
    """downloaded(name, content): what the next download leaves; the commands that were run."""
    commands = []

    def put(name, content, error=""):
        def run(command, cwd, **_):
            commands.append(command)
            if content is not None:
                Path(cwd, name).write_bytes(content)
            return subprocess.CompletedProcess(command, int(bool(error)), "", error)

        monkeypatch.setattr("shutil.which", lambda name: sys.executable)
        monkeypatch.setattr("subprocess.run", run)
        return commands

    return put


def tarball(files: dict[str, bytes], kind: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=f"w:{kind}") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
    parts = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": b"odd",
        "data.tar.xz": tarball(files, "xz"),
    }
    content = b"!<arch>\n"
    for name, data in parts.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        content += head + data + b"\n" * (len(data) % 2)
    return content


CASES = {
    "npm": ("npm_file", "@scope/name@1.0", "name.tgz",
            lambda files: tarball({f"package/{n}": c for n, c in files.items()}, "gz")),
    "debian": ("debian_file", "name=1.0-1", "name_1.0-1_all.deb",
               lambda files: deb({f"./{n}": c for n, c in files.items()})),
}  # fmt: skip


@pytest.mark.parametrize("kind", CASES)
def test_a_package_is_fetched_once(kind, packages, downloaded):
    name, package, file, archive = CASES[kind]
    content = archive({"data/a.txt": b"a text", "data/b.txt": b"another"})
    sha256 = hashlib.sha256(content).hexdigest()
    commands = downloaded(file, content)
    get = getattr(packages, name)
    assert get(package, sha256, "data/a.txt").read_bytes() == b"a text"
    assert get(package, sha256, "data/b.txt").read_bytes() == b"another"
    assert {path.name for path in get(package, sha256, "data").iterdir()} == {"a.txt", "b.txt"}
    assert len(commands) == 1 and package in commands[0]
    with pytest.raises(packages.Unavailable, match=r"holds no data/c\.txt"):
        get(package, sha256, "data/c.txt")


@pytest.mark.parametrize("kind", CASES)
def test_what_is_not_the_pinned_package_is_refused(kind, packages, downloaded, monkeypatch):
    name, package, file, archive = CASES[kind]
    get, wrong = getattr(packages, name), "0" * 64
    downloaded(file, archive({"a": b"changed"}))
    with pytest.raises(packages.Unavailable, match=r"sha256 is \w{12}\.\.\., not 000000000000"):
        get(package, wrong, "a")
    outside = archive({"../../a": b"out"})
    downloaded(file, outside)
    with pytest.raises(packages.Unavailable, match="cannot be unpacked"):
        get(package, hashlib.sha256(outside).hexdigest(), "a")
    downloaded(file, None, "no network")
    with pytest.raises(packages.Unavailable, match="failed: no network"):
        get(package, wrong, "a")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(packages.Unavailable, match="is not installed"):
        get(package, wrong, "a")


def ztext(folder: Path, testaments: dict[str, list[list[str]]]) -> None:
    """A zText module of these blocks of entries."""
    for testament, parts in testaments.items():
        blocks, index, packed = b"", b"", b""
        for number, entries in enumerate(parts):
            text = b""
            for entry in entries:
                index += struct.pack("<IIH", number, len(text), len(entry.encode()))
                text += entry.encode()
            squeezed = zlib.compress(text)
            blocks += struct.pack("<III", len(packed), len(squeezed), len(text))
            packed += squeezed
        for kind, content in {"bzs": blocks, "bzv": index, "bzz": packed}.items():
            (folder / f"{testament}.{kind}").write_bytes(content)


def test_verses_are_read_by_book_and_chapter(example, tmp_path):
    heading = '<div canonical="true" osisID="{0}" sID="g1" type="book"/><title>The Book</title>'
    chapter = '<chapter n="{1}" osisID="{0}.{1}" sID="{0}.{1}"/> '
    old = [
        ["", '<milestone type="x-importer"/>'],
        [
            heading.format("Gen"),
            chapter.format("Gen", 1),
            '¶ In the <w lemma="strong:H7225">begin</w>ning<note>1.1 or <i>first</i></note>. ',
            'His <transChange type="added">own</transChange><lb/>son \\nd LORD &amp; '
            '<chapter eID="Gen.1"/>',
            chapter.format("Gen", 2),
            "",
            'The end.<div canonical="true" eID="g1" type="book"/>',
        ],
        [heading.format("1Sam"), chapter.format("1Sam", 1), "Now"],
    ]
    new = [["", ""], [heading.format("Matt"), chapter.format("Matt", 1), "É dijo"]]
    ztext(tmp_path, {"ot": old, "nt": new})
    assert example("verses").read_ztext(tmp_path) == {
        ("Gen", 1, 1): "In the beginning.",
        ("Gen", 1, 2): "His own son LORD &",
        ("Gen", 2, 2): "The end.",
        ("1Sam", 1, 1): "Now",
        ("Matt", 1, 1): "É dijo",
    }


@pytest.mark.slow
def test_the_bibles_are_whole(example):
    verses = example("verses")
    try:
        english, spanish = verses.king_james(), verses.reina_valera()
    except verses.Unavailable as why:
        pytest.skip(f"the verses cannot be had: {why}")
    assert len(english) == 31102 and len(spanish) == 31084 and english.keys() > spanish.keys()
    assert english["Ps", 23, 1] == "The LORD is my shepherd; I shall not want."
    assert english["Rev", 22, 21].endswith("Amen.") and spanish["Rev", 22, 21].endswith("Amén.")
    assert not {"<", ">", "\\", "¶"} & set("".join([*english.values(), *spanish.values()]))
    assert sum(book in verses.NEW_TESTAMENT for book, _, _ in english) == 7957
