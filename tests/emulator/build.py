"""Compiles .cu files as C++ for the emulator, into one shared library a set of sources."""

import fcntl
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# No contraction: a kernel that needs an fma says so.
FLAGS = ["-std=c++20", "-O1", "-g1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-ffp-contract=off"]
FLAGS += ["-fvisibility=hidden", "-fno-strict-aliasing", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer"]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def why_not() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return (
            f"the emulator's fibers are x86-64 Linux, this is {platform.machine()} {sys.platform}"
        )
    if not shutil.which(compiler()[0]):
        return f"no C++ compiler ({compiler()[0]})"
    return None


def build(
    name: str,
    sources: list[Path],
    flags: list[str] | None = None,
    libraries: list[str] | None = None,
) -> Path:
    """The library of these .cu and .cpp files and the engine; made again where a file changed.
    FASTTX_EMULATOR_SANITIZE=1: with AddressSanitizer, whose library must have been preloaded."""
    sanitize = os.environ.get("FASTTX_EMULATOR_SANITIZE") == "1"
    folder = ROOT / "build" / f"emulator-{name}{'-asan' if sanitize else ''}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"lib{name}.so"
    more = [*(SANITIZE if sanitize else []), *(flags or [])]
    command = " ".join(map(shlex.quote, [*compiler(), *FLAGS, *more]))
    lines = [
        f"builddir = {folder}",
        "rule compile",
        f"  command = {command} -MD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {command} -shared $in {shlex.join(libraries or [])} -o $out",
    ]
    objects = []
    for source in (HERE / "engine/engine.cpp", *sources):
        stem = source.resolve().relative_to(ROOT).as_posix().replace("/", "_")
        objects.append(folder / f"{stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    lines.append(f"build {library}: link {' '.join(map(str, objects))}")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / "build.ninja").write_text("\n".join(lines) + "\n")
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        ninja = shutil.which("ninja", path=path)
        if ninja is None:
            raise RuntimeError("the emulator's build needs ninja (pip install ninja)")
        done = subprocess.run(
            [ninja, "-C", str(folder)],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path},
        )
        if done.returncode:
            raise RuntimeError(f"the emulator did not compile:\n{done.stdout}{done.stderr}")
    return library
