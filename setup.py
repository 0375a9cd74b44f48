"""Builds what pyproject.toml cannot say: the native libraries, by a build.ninja of its own.

fasttx/libfasttx.so  Python-free: the CPU kernels, one object per instruction set, the CUDA kernels
                     where nvcc and a torch with CUDA are found, and csrc/ops*.cpp on torch's stable
                     ABI: one file serves every torch from 2.11 on.
fasttx/_C*.so        pybind11 without ATen, csrc/bind.cpp: queries and test hooks.

Environment: FASTTX_NATIVE=0 (no native code), CXX, FASTTX_NVCC, FASTTX_CUDA=0|1 (default: where
nvcc and a torch with CUDA are found), FASTTX_CUDA_ARCHS (default "80;90a"), MAX_JOBS. Sources in
csrc/cuda/sm90/ are for sm_90a alone, those in csrc/cuda/sm80/ for the other architectures and, as
PTX, for cards to come.
"""

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

TORCH_MIN = (2, 11)  # the first torch whose stable ABI has all that csrc/ops calls
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"

# Instruction set -> compiler flags; csrc/cpu/dispatch.cpp picks one at run time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512 += ["-mprefer-vector-width=512"]
ISA_FLAGS = {
    "default": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
}
CXX_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-Wall"]
# gcc 12 takes its own AVX-512 headers for uninitialized reads.
CXX_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]

# The newest symbol versions a manylinux_2_34 wheel may need.
MANYLINUX = "manylinux_2_34"
SYMBOL_LIMITS = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13)}


def cxx():
    """The C++ compiler's command, as a list."""
    return shlex.split(os.environ.get("CXX", "g++"))


def why_not_native():
    """Why this machine gets fasttx without native code, or None."""
    if os.environ.get("FASTTX_NATIVE") == "0":
        return "it was installed with FASTTX_NATIVE=0"
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        machine = f"{platform.machine()} {sys.platform}"
        return f"the native kernels are written for x86-64 Linux, this is {machine}"
    if not shutil.which(cxx()[0]):
        return f"no C++ compiler ({cxx()[0]}; CXX names another) when it was installed"
    return None


def find_torch():
    """The folder of the torch this build is for; importing torch would cost seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "fasttx: the native code is built against the torch it will run with, and none is "
            "installed here: install torch >= 2.11, then run pip install with "
            "--no-build-isolation (FASTTX_NATIVE=0 installs fasttx without native code)."
        )
    version = importlib.metadata.version("torch")
    if tuple(int(n) for n in re.match(r"(\d+)\.(\d+)", version).groups()) < TORCH_MIN:
        raise SystemExit(
            f"fasttx: torch {version} is too old: fasttx needs torch >= 2.11 (tested with 2.13.0)."
        )
    return Path(spec.submodule_search_locations[0])


def find_nvcc(torch):
    """nvcc; None where there is none, nothing for it to compile, or FASTTX_CUDA=0; and where torch
    is one without CUDA, unless FASTTX_CUDA=1."""
    wanted = os.environ.get("FASTTX_CUDA", "")
    if wanted == "0" or not any(CSRC.glob("cuda/**/*.cu")):
        return None
    if wanted != "1" and not (torch / "lib/libtorch_cuda.so").is_file():
        return None
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [os.environ.get("FASTTX_NVCC"), shutil.which("nvcc")]
    places += [f"{home}/bin/nvcc" for home in homes if home]
    nvcc = next((p for p in places if p and os.access(p, os.X_OK)), None)
    if nvcc is None and wanted == "1":
        raise SystemExit(
            "fasttx: FASTTX_CUDA=1 asks for the CUDA kernels, but no nvcc was found; "
            "FASTTX_NVCC names one."
        )
    return nvcc


def cuda_targets(room, archs):
    """nvcc's targets for a source in csrc/cuda/<room>/."""
    if room == "sm90":
        archs = ["90a"]
    elif room == "sm80":
        archs = [a for a in archs if a != "90a"] or ["80"]
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    # What "a" names is one card's own; PTX of the oldest other runs on every later card.
    if portable := sorted((a for a in archs if a.isdecimal()), key=int):
        targets.append(f"-gencode=arch=compute_{portable[0]},code=compute_{portable[0]}")
    return targets


def escaped(*paths):
    """Paths as ninja wants them in a build line."""
    return " ".join(re.sub(r"([$ :])", r"$\1", str(path)) for path in paths)


def shell(*words):
    """Words as the shell that ninja calls wants them, `$` kept from ninja."""
    return shlex.join(map(str, words)).replace("$", "$$")


class Ninja:
    """The text of a build.ninja: rules, and one line per file made."""

    def __init__(self, build_dir, nvcc):
        self.build_dir = build_dir
        self.lines = [
            f"builddir = {escaped(build_dir)}",
            f"cxx = {shell(*cxx())}",
            f"nvcc = {shell(nvcc)}",
            "rule cxx",
            "  command = $cxx -MD -MF $out.d $flags -c $in -o $out",
            "  description = $shown",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            "  command = $nvcc -MD -MF $out.d $flags -c $in -o $out",
            "  description = $shown",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -shared $in $flags -o $out",
            "  description = link $out",
            "rule nvlink",
            "  command = $nvcc -shared -cudart static $in $flags -o $out",
            "  description = link $out",
        ]

    def object(self, source, flags, rule="cxx", level=None):
        name = source.relative_to(ROOT).as_posix()
        out = self.build_dir / (name.replace("/", "_") + (f".{level}" if level else "") + ".o")
        self.lines += [f"build {escaped(out)}: {rule} {escaped(source)}"]
        self.lines += [f"  flags = {shell(*flags)}"]
        self.lines += [f"  shown = compile {name}" + (f" [{level}]" if level else "")]
        return out

    def link(self, out, objects, linker_flags, flags, exports, rule="link", after=()):
        """Links a shared library that shows only the symbols matching `exports`."""
        script = self.build_dir / f"{out.name}.map"
        text = f"{{ global: {exports}; local: *; }};\n"
        if not script.is_file() or script.read_text() != text:
            script.write_text(text)
        words = []
        for flag in [*linker_flags, f"--version-script={script}"]:
            words += ["-Xlinker", flag]
        inputs = f"{escaped(*objects)} | {escaped(script, *after)}"
        self.lines += [f"build {escaped(out)}: {rule} {inputs}"]
        self.lines += [f"  flags = {shell(*words, *flags)}"]

    def run(self):
        (self.build_dir / "build.ninja").write_text("\n".join(self.lines) + "\n")
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        ninja = shutil.which("ninja", path=path)
        if ninja is None:
            raise SystemExit("fasttx: the build needs ninja (pip install ninja).")
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        if subprocess.run([ninja, "-C", str(self.build_dir), "-j", jobs]).returncode:
            raise SystemExit(
                "fasttx: the native code did not compile (the compiler's message is above); "
                "FASTTX_NATIVE=0 installs fasttx without it."
            )


class NinjaBuildExt(build_ext):
    def run(self):
        if self.extensions:
            super().run()

    def build_extensions(self):
        torch = find_torch()
        nvcc = find_nvcc(torch)
        # Kept between builds: an editable install gets a new temporary build_temp each time.
        build_dir = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        outs = {e.name: Path(self.get_ext_fullpath(e.name)).resolve() for e in self.extensions}
        for out in outs.values():
            out.parent.mkdir(parents=True, exist_ok=True)
        with open(build_dir / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ninja = Ninja(build_dir, nvcc)
            self.plan_library(ninja, outs["fasttx.libfasttx"], torch, nvcc)
            if "fasttx._C" in outs:
                self.plan_bindings(ninja, outs["fasttx._C"], outs["fasttx.libfasttx"])
            ninja.run()

    def plan_library(self, ninja, library, torch, nvcc):
        flags = [*CXX_FLAGS, f"-I{CSRC}"]
        objects = []
        for source in sorted(CSRC.glob("cpu/*.cpp")):
            if source.name == "dispatch.cpp":
                objects.append(ninja.object(source, flags))
                continue
            for level, isa in ISA_FLAGS.items():
                isa_flags = [*flags, *isa, f"-DFASTTX_ISA=isa_{level}"]
                objects.append(ninja.object(source, isa_flags, level=level))
        if nvcc:
            archs = os.environ.get("FASTTX_CUDA_ARCHS", "80;90a").replace(",", ";").split(";")
            cuda = ["-std=c++20", "-O3", "-lineinfo", "--threads", "2", f"-I{CSRC}"]
            cuda += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
            for source in sorted(CSRC.glob("cuda/**/*.cu")):
                targets = cuda_targets(source.parent.name, archs)
                objects.append(ninja.object(source, [*cuda, *targets], "nvcc"))
        flags += ["-isystem", torch / "include", TORCH_TARGET]
        flags += ["-DFASTTX_WITH_CUDA"] if nvcc else []
        flags += [f"-ffile-prefix-map={ROOT}/="]  # torch's checks put the file's name in the error
        bindings = [CSRC / "ops.cpp", *sorted(CSRC.glob("ops/*.cpp"))]
        bindings += sorted(CSRC.glob("ops/cuda/*.cpp")) if nvcc else []
        for source in bindings:
            objects.append(ninja.object(source, flags))
        linker = ["--exclude-libs=ALL", "-z", "defs", "-soname=libfasttx.so", "--no-as-needed"]
        libraries = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10"]
        ninja.link(library, objects, linker, libraries, "fasttx_*", "nvlink" if nvcc else "link")

    def plan_bindings(self, ninja, bindings, library):
        import pybind11

        flags = [*CXX_FLAGS, "-O1", f"-I{CSRC}"]
        for include in (pybind11.get_include(), sysconfig.get_path("include")):
            flags += ["-isystem", include]
        objects = [ninja.object(CSRC / "bind.cpp", flags)]
        linker = ["--exclude-libs=ALL", "-rpath=$ORIGIN"]
        libraries = [f"-L{library.parent}", "-lfasttx"]
        ninja.link(bindings, objects, linker, libraries, "PyInit__C", after=[library])

    def get_ext_filename(self, fullname):
        if fullname.rpartition(".")[2] == "libfasttx":
            return fullname.replace(".", "/") + ".so"
        return super().get_ext_filename(fullname)


class BuildPy(build_py):
    """Leaves fasttx/_build.json beside the modules: why the package holds no native code."""

    def run(self):
        super().run()
        place = ROOT / "fasttx" if self.editable_mode else Path(self.build_lib, "fasttx")
        place.mkdir(parents=True, exist_ok=True)
        (place / "_build.json").write_text(json.dumps({"no_native": NO_NATIVE}) + "\n")


class ManylinuxWheel(bdist_wheel):
    """Tags the wheel manylinux_2_34 if its libraries keep within that policy's symbol versions."""

    def get_tag(self):
        python, abi, plat = super().get_tag()
        libraries = list(Path(self.bdist_dir or "").glob("fasttx/*.so"))
        if plat == "linux_x86_64" and libraries and all(within_manylinux(lib) for lib in libraries):
            plat = f"{MANYLINUX}_x86_64"
        return python, abi, plat


def within_manylinux(library):
    """Whether no symbol version that the library needs is newer than the policy allows."""
    if not shutil.which("readelf"):
        return False
    command = ["readelf", "--version-info", "--wide", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", text)
    return all(tuple(map(int, v.split("."))) <= SYMBOL_LIMITS[name] for name, v in needed)


def extensions():
    if NO_NATIVE:
        return []
    names = ["fasttx.libfasttx"]
    if Path(sysconfig.get_path("include"), "Python.h").is_file():
        names.append("fasttx._C")
    else:
        print(
            "fasttx: building without fasttx._C, which serves queries and tests: "
            "Python.h is not installed (python3-dev)."
        )
    return [Extension(name, []) for name in names]


def packages():
    """Package name -> folder: kernels/ and benchmarks/ are installed inside fasttx."""
    found = {}
    for room in ("fasttx", "kernels", "benchmarks"):
        if not (ROOT / room).is_dir():
            continue
        files = [ROOT / room / "any.py", *ROOT.glob(f"{room}/**/*.py")]
        for folder in {file.parent.relative_to(ROOT).as_posix() for file in files}:
            name = folder.replace("/", ".")
            found[name if room == "fasttx" else f"fasttx.{name}"] = folder
    return found


NO_NATIVE = why_not_native()
if NO_NATIVE:
    print(f"fasttx: installing without native code, on PyTorch's own operations: {NO_NATIVE}.")
PACKAGES = packages()

setup(
    packages=sorted(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "fasttx": ["py.typed", "choices.json", "gpu_runs.json"],
        "fasttx.benchmarks": ["*.html"],
        "fasttx.inspect": ["*.html"],
        "fasttx.kernels": ["tuned.json"],
    },
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuildExt, "build_py": BuildPy, "bdist_wheel": ManylinuxWheel},
    zip_safe=False,
)
