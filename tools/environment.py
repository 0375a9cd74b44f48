"""What `make` needs first: a Python environment with torch, the packages, and fasttx built in it.

The environment is the active one if it has torch, else .venv here. Its python's path is left in
build/python. Nothing that is there is fetched or built again; a torch that is there is kept.

Environment: TORCH_INSTALL (pip's arguments to install torch with), FASTTX_OWN_ENV=1 (always .venv,
seeing no packages but its own), and pip's own settings.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
OWN = ROOT / ".venv"

TORCH = "2.13.0"
# The triton that each torch release names as its own; the interpreter of others may be wrong.
TRITON = {
    "2.11": "triton==3.6.0",
    "2.12": "triton==3.7.1",
    "2.13": "triton==3.7.1",
    "2.14": "triton~=3.8.0",
    "2.15": "triton~=3.9.0",
}


def say(text):
    print(f"fasttx: {text}", file=sys.stderr, flush=True)


def stop(text):
    raise SystemExit(f"fasttx: {text}")


def version_of(python, package):
    """The version of a package installed beside an interpreter, or None. Imports nothing of it."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    return out.stdout.strip() if out.returncode == 0 else None


def has_gpu():
    return bool(shutil.which("nvidia-smi")) or Path("/proc/driver/nvidia").exists()


def choose():
    """The interpreter of the environment to use, made where there is none."""
    own_only = os.environ.get("FASTTX_OWN_ENV") == "1"
    inside = sys.prefix if sys.prefix != sys.base_prefix else None
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX") or inside
    if active and not own_only:
        python = f"{active}/bin/python"
        if os.access(python, os.X_OK) and version_of(python, "torch"):
            return python
    python = str(OWN / "bin" / "python")
    if not Path(python).exists() or not version_of(python, "pip"):
        make_venv(system_packages=not own_only and bool(version_of(sys.executable, "torch")))
    return python


def make_venv(system_packages):
    seen = " that sees the torch installed here" if system_packages else ""
    say(f"making the environment .venv{seen}")
    command = [sys.executable, "-m", "venv", "--clear", str(OWN)]
    command += ["--system-site-packages"] if system_packages else []
    if subprocess.run(command, stdout=sys.stderr).returncode:
        stop(
            "python3 cannot make a virtual environment: install python3-venv (Debian) and try again"
        )


def pip(python, *args, quiet=True):
    command = [python, "-m", "pip", "install", *(["-q"] if quiet else []), *args]
    return subprocess.run(command, stdout=sys.stderr).returncode


def install_torch(python):
    """Install torch; its CPU build where there is no GPU and pip's settings lead to one."""
    if override := os.environ.get("TORCH_INSTALL"):
        say(f"fetching torch as TORCH_INSTALL says: pip install {override}")
        if pip(python, *shlex.split(override), quiet=False):
            stop("torch could not be installed as TORCH_INSTALL says (pip's message is above)")
        return
    if not has_gpu():
        say(f"no GPU here: looking for the CPU build of torch {TORCH} (about 200 MB)")
        # The local version exists only where a CPU-build index or folder is configured for pip.
        found = [python, "-m", "pip", "install", "-q", f"torch=={TORCH}+cpu"]
        if subprocess.run(found, stdout=sys.stderr, stderr=subprocess.DEVNULL).returncode == 0:
            return
        say(
            "pip's settings lead to no CPU build. Fetching the standard one, which may bring CUDA "
            "packages (about 2.5 GB in all); to choose another, stop this and set TORCH_INSTALL to "
            f"pip's arguments: TORCH_INSTALL='torch=={TORCH} --index-url <an index of CPU builds>'"
        )
    else:
        say(f"fetching torch {TORCH} with its CUDA packages (about 2.5 GB)")
    if pip(python, f"torch=={TORCH}", quiet=False):
        stop(f"torch {TORCH} could not be installed (pip's message is above)")


def triton_for(torch_version):
    """The requirement of triton that goes with a torch release."""
    return TRITON.get(".".join(torch_version.split(".")[:2]), "triton>=3.6")


def requirements():
    """The packages of pyproject.toml for building, testing and benchmarking, without torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    wanted = [*project["project"]["dependencies"], *groups["build"], *groups["test"]]
    return sorted({name for name in wanted if not name.startswith("torch")})


def digest(*parts):
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def sources():
    """What the built package depends on, as text: the sources of native code and the packages."""
    files = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    files += [p for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()]
    rooms = ("fasttx", "kernels", "benchmarks")
    packages = sorted({str(p.parent) for room in rooms for p in (ROOT / room).rglob("*.py")})
    settings = {k: v for k, v in os.environ.items() if k.startswith("FASTTX_") or k == "CXX"}
    return digest(
        *(f"{p}:{digest(p.read_bytes())}" for p in files), *packages, sorted(settings.items())
    )


def built(python):
    """Whether fasttx is installed for development from this checkout."""
    code = (
        "import importlib.metadata as m, json;"
        "print(json.loads(m.distribution('fasttx').read_text('direct_url.json'))['url'])"
    )
    out = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd="/")
    return out.stdout.strip() == ROOT.as_uri()


def main():
    if sys.version_info < (3, 11):  # noqa: UP036
        stop(
            f"needs Python 3.11 or newer, this is {sys.version.split()[0]}: make PYTHON=python3.11"
        )
    BUILD.mkdir(exist_ok=True)
    python = choose()
    stamp = BUILD / f"environment-{digest(python)}.json"
    done = json.loads(stamp.read_text()) if stamp.is_file() else {}

    if not (torch := version_of(python, "torch")):
        install_torch(python)
        torch = version_of(python, "torch")
    if tuple(map(int, torch.split(".")[:2])) < (2, 11):
        stop(f"torch {torch} in {python} is too old: fasttx needs torch >= 2.11")

    wanted = [*requirements(), triton_for(torch)]
    packages = digest(python, torch, *wanted)
    if done.get("packages") != packages:
        keep = BUILD / "constraints.txt"
        keep.write_text(f"torch=={torch}\n")
        if not version_of(python, "triton"):
            say(f"fetching {wanted[-1]} for the Triton kernels (about 200 MB)")
            if pip(python, "--no-deps", wanted[-1]):
                say("triton could not be installed: the Triton kernels will not be usable")
        say(f"fetching what is missing of {', '.join(wanted[:-1])} (about 70 MB)")
        if pip(python, "-c", str(keep), *wanted[:-1]):
            stop("the packages could not be installed (pip's message is above)")
        done = {"packages": packages}

    source = digest(packages, sources())
    if done.get("source") != source or not built(python):
        say("building (about a minute on two cores the first time)")
        # pip shows nothing while it builds, so compile first; then it has only to link.
        compiled = [python, "setup.py", "-q", "build_ext", "--inplace"]
        if subprocess.run(compiled, cwd=ROOT, stdout=sys.stderr).returncode or pip(
            python, "--no-build-isolation", "--no-deps", "-e", str(ROOT)
        ):
            stop("the build failed (the message is above)")
        reason = json.loads((ROOT / "fasttx" / "_build.json").read_text())["no_native"]
        if reason:
            say(f"there is no native code, ops run on PyTorch's own operations: {reason}")
        done["source"] = source
    stamp.write_text(json.dumps(done))
    (BUILD / "python").write_text(python + "\n")


if __name__ == "__main__":
    main()
