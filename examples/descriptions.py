"""Descriptions of Debian's packages: a synopsis of one line and a body of paragraphs.

`apt-get update` fetches Translation-en of the suites this machine knows into a folder of the cache;
it needs no rights and leaves the system's lists as they are. The texts have the licences of their
packages, and are not kept elsewhere.
"""

import re
import shutil
import subprocess
from pathlib import Path

from fasttx.benchmarks.models.weights import Unavailable, cache_directory

__all__ = ["Unavailable", "descriptions", "parsed"]

HELPER = "/usr/lib/apt/apt-helper"


def descriptions(*, timeout_s: float = 300) -> dict[str, tuple[str, list[str]]]:
    """{package: (synopsis, paragraphs)}; Unavailable with the reason: no apt, no network."""
    lists = cache_directory() / "debian-descriptions"
    found = sorted(lists.glob("*_main_i18n_Translation-en*"))
    if not found:
        if shutil.which("apt-get") is None:
            raise Unavailable("descriptions: apt-get is not installed")
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options = [f"Dir::State::Lists={lists}", f"Dir::Cache={lists}", "Acquire::Languages=en",
                   "APT::Sandbox::User=root", "Acquire::IndexTargets::deb::Packages::"
                   "DefaultEnabled=false"]  # fmt: skip
        command = ["apt-get", "update", "-q", *(word for o in options for word in ("-o", o))]
        done = _run(command, timeout_s)
        found = sorted(lists.glob("*_main_i18n_Translation-en*"))
        if done.returncode or not found:
            reason = done.stderr.decode(errors="replace").strip()[-200:]
            raise Unavailable(f"descriptions: apt-get update failed: {reason or 'no such file'}")
    done = _run([HELPER, "cat-file", *map(str, found)], timeout_s)
    if done.returncode:
        raise Unavailable(f"descriptions: {HELPER} failed: {done.stderr.decode()[-200:]}")
    return parsed(done.stdout.decode())


def _run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess:
    if shutil.which(command[0]) is None:
        raise Unavailable(f"descriptions: {Path(command[0]).name} is not installed")
    try:
        return subprocess.run(command, capture_output=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise Unavailable(
            f"descriptions: {' '.join(command[:2])} took more than {timeout_s:.0f} s"
        ) from None


def parsed(text: str) -> dict[str, tuple[str, list[str]]]:
    """Of a Translation file: entries parted by empty lines, `Description-en: synopsis`, then lines
    that begin with a space, of which ` .` ends a paragraph."""
    found = {}
    for entry in text.split("\n\n"):
        name = re.search(r"^Package: (\S+)$", entry, re.M)
        given = re.search(r"^Description-en: (.*)\n((?: .*(?:\n|$))+)", entry, re.M)
        if name and given:
            parts = re.split(r"^ \.\s*$", given[2], flags=re.M)
            paragraphs = [" ".join(part.split()) for part in parts]
            found[name[1]] = given[1].strip(), [p for p in paragraphs if p]
    return found
