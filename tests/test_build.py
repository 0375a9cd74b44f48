"""What is built, what it needs, and what happens where it cannot be."""

import concurrent.futures
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import fasttx
from fasttx import native

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / f"ninja-{sys.implementation.cache_tag}"
BINDINGS = native.LIBRARY.with_name(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")

needs_library = pytest.mark.skipif(
    not native.LIBRARY.is_file(), reason="the native library is not built"
)
needs_binutils = pytest.mark.skipif(
    not shutil.which("nm") or not shutil.which("readelf"), reason="needs nm and readelf"
)

# libtorch, and what every Linux with glibc has.
ALLOWED_LIBRARIES = {
    "libtorch_cpu.so",
    "libc10.so",
    "libfasttx.so",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libm.so.6",
    "libc.so.6",
    "libdl.so.2",
    "libpthread.so.0",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
}

ATTENTION = """
import warnings
warnings.simplefilter("ignore")
import torch, fasttx, fasttx.native
q, k, v = torch.randn(3, 2, 3, 5, 8, requires_grad=True).unbind()
out = fasttx.attention(q, k, v, is_causal=True)
out.sum().backward()
torch.testing.assert_close(
    out, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
)
print("backend", fasttx.explain(fasttx.attention, q, k, v, is_causal=True).chosen("attention_fwd"))
print("reason", fasttx.native.unavailable())
print("isa", fasttx.native.cpu_isa())
print("file", fasttx.__file__)
"""


def run_attention(python=sys.executable, **kwargs):
    """What a fresh interpreter says of one attention call: {"backend", "reason", "isa", "file"}."""
    command = [python, "-c", ATTENTION]
    out = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert out.returncode == 0, out.stderr
    return dict(line.split(" ", 1) for line in out.stdout.splitlines())


def environment(**changes):
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTTX_")}
    return env | changes


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem + "_script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup_script(monkeypatch):
    """setup.py as a module; its call of setup() does nothing."""
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: None)
    return load_script(ROOT / "setup.py")


@pytest.fixture
def unloaded(monkeypatch):
    """fasttx.native as it is before the library is first asked for."""
    monkeypatch.delenv("FASTTX_NATIVE", raising=False)
    monkeypatch.delenv("FASTTX_CPU_ISA", raising=False)
    monkeypatch.setattr(native, "_loaded", False)
    monkeypatch.setattr(native, "_reason", None)
    return native


def test_library_is_built_where_there_is_a_compiler(unloaded, setup_script):
    if reason := setup_script.why_not_native():
        pytest.skip(reason)
    assert native.unavailable() is None
    assert BINDINGS.is_file() == ("fasttx._C" in [e.name for e in setup_script.extensions()])
    assert native.cpu_isa() == native.supported_levels()[-1]


def test_version_has_one_source():
    assert importlib.metadata.version("fasttx") == fasttx.__version__


@needs_library
@needs_binutils
def test_libraries_export_only_what_is_wanted():
    def exported(path):
        out = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True)
        return {line.split()[-1] for line in out.stdout.splitlines()}

    names = exported(native.LIBRARY)
    assert "fasttx_cpu_isa" in names
    assert not [name for name in names if not name.startswith("fasttx_")]
    if BINDINGS.is_file():
        assert exported(BINDINGS) == {"PyInit__C"}


@needs_library
@needs_binutils
def test_instruction_sets_do_not_leak(setup_script):
    """A weak symbol of an AVX-512 object could become the one copy that every level runs."""
    sources = [p for p in ROOT.glob("csrc/cpu/*.cpp") if p.name != "dispatch.cpp"]
    objects = [
        OBJECTS / f"csrc_cpu_{source.name}.{level}.o"
        for source in sources
        for level in setup_script.ISA_FLAGS
    ]
    objects = [path for path in objects if path.is_file()]
    if not objects:
        pytest.skip("the objects of the build are not here")
    assert len(objects) >= len(setup_script.ISA_FLAGS)
    for path in objects:
        out = subprocess.run(["nm", "--defined-only", path], capture_output=True, text=True)
        weak = [line for line in out.stdout.splitlines() if line.split()[-2] in "WVu"]
        assert not weak, f"{path.name}: {weak}"


@needs_library
@needs_binutils
@pytest.mark.parametrize("library", [native.LIBRARY, BINDINGS], ids=["libfasttx", "_C"])
def test_libraries_need_only_what_every_machine_has(library, setup_script):
    if not library.is_file():
        pytest.skip(f"{library.name} is not built")
    assert setup_script.within_manylinux(library)
    out = subprocess.run(["readelf", "-d", library], capture_output=True, text=True).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", out))
    assert "libtorch_cpu.so" in needed or "libfasttx.so" in needed
    assert not needed - ALLOWED_LIBRARIES


@needs_binutils
def test_manylinux_check_can_fail(setup_script, monkeypatch):
    if not native.LIBRARY.is_file():
        pytest.skip("the native library is not built")
    limits = setup_script.SYMBOL_LIMITS | {"GLIBC": (2, 2)}
    monkeypatch.setattr(setup_script, "SYMBOL_LIMITS", limits)
    assert not setup_script.within_manylinux(native.LIBRARY)


@needs_library
@needs_binutils
def test_library_holds_no_run_path():
    out = subprocess.run(["readelf", "-d", native.LIBRARY], capture_output=True, text=True).stdout
    assert not re.search(r"RUNPATH|RPATH", out)


def test_load_is_thread_safe_and_happens_once(unloaded, monkeypatch, tmp_path):
    library = tmp_path / "libfasttx.so"
    library.touch()
    monkeypatch.setattr(native, "LIBRARY", library)
    loads = []
    monkeypatch.setattr(torch.ops, "load_library", loads.append)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: native.load(), range(32)))
    assert loads == [str(library)]


def test_missing_library_is_said(unloaded, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libfasttx.so")
    assert "make build" in native.unavailable()
    with pytest.raises(RuntimeError, match="not available: not built"):
        native.load()
    assert native.cpu_isa() is None


def test_reason_of_the_build_is_kept(unloaded, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libfasttx.so")
    (tmp_path / "_build.json").write_text(json.dumps({"no_native": "no C++ compiler (g++)"}))
    assert native.unavailable() == "fasttx was installed without it: no C++ compiler (g++)"


def test_broken_library_is_said(unloaded, monkeypatch, tmp_path):
    broken = tmp_path / "libfasttx.so"
    broken.write_text("not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    reason = native.unavailable()
    assert f"could not be loaded into torch {torch.__version__}" in reason
    assert "\n" not in reason


@pytest.mark.parametrize("version", ["2.10.0", "2.9.1+cu128", "1.13.0"])
def test_old_torch_is_said(unloaded, monkeypatch, tmp_path, version):
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libfasttx.so")
    native.LIBRARY.touch()
    monkeypatch.setattr(torch, "__version__", version)
    assert native.unavailable() == f"torch {version} is too old: fasttx needs torch >= 2.11"


def test_native_switched_off(unloaded, monkeypatch):
    monkeypatch.setenv("FASTTX_NATIVE", "0")
    assert native.unavailable() == "FASTTX_NATIVE=0 is set"


def test_runs_on_the_reference_without_the_library():
    said = run_attention(env=environment(FASTTX_NATIVE="0"))
    assert said["backend"] == "reference"
    assert said["reason"] == "FASTTX_NATIVE=0 is set"


def test_unknown_instruction_set_is_refused(unloaded, monkeypatch):
    monkeypatch.setenv("FASTTX_CPU_ISA", "avx1024")
    with pytest.raises(ValueError, match=r"'avx1024' is unknown; .*default, avx2, avx512, avx512b"):
        native.unavailable()


def test_instruction_set_beyond_the_cpu_is_refused(unloaded, monkeypatch):
    monkeypatch.setattr(native, "supported_levels", lambda: ["default", "avx2"])
    monkeypatch.setenv("FASTTX_CPU_ISA", "avx512")
    with pytest.raises(ValueError, match=r"'avx512' is more than .* it runs default, avx2"):
        native.load()


@needs_library
@pytest.mark.parametrize("level", native.supported_levels()[:-1])
def test_instruction_set_can_be_forced(level):
    said = run_attention(env=environment(FASTTX_CPU_ISA=level))
    assert said["isa"] == level
    assert said["backend"] == "cpu"


def test_levels_are_those_of_the_build(setup_script):
    assert list(native.LEVELS) == list(setup_script.ISA_FLAGS)
    assert native.TORCH_MIN == setup_script.TORCH_MIN


def test_no_compiler_is_a_reason_not_an_error(tmp_path):
    """A build without a compiler makes a package that says so and runs on the reference."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    env = environment(CXX="no-such-compiler")
    out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    sentence = "no C++ compiler (no-such-compiler; CXX names another) when it was installed"
    assert sentence in out.stdout
    said = run_attention(env=environment(PYTHONPATH=str(tmp_path)), cwd="/")
    assert said["file"].startswith(str(tmp_path))
    assert said["backend"] == "reference"
    assert said["reason"] == f"fasttx was installed without it: {sentence}"


def test_build_without_torch_is_one_sentence(setup_script, monkeypatch):
    monkeypatch.setattr(setup_script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"install torch >= 2\.11, .*--no-build-isolation"):
        setup_script.find_torch()


def test_build_with_old_torch_is_one_sentence(setup_script, monkeypatch):
    monkeypatch.setattr(setup_script.importlib.metadata, "version", lambda name: "2.10.0+cpu")
    with pytest.raises(SystemExit, match=r"torch 2\.10\.0\+cpu is too old: .* torch >= 2\.11"):
        setup_script.find_torch()


def test_cuda_needs_nvcc_only_where_it_is_asked_for(setup_script, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_script, "CSRC", tmp_path)
    monkeypatch.setattr(setup_script.shutil, "which", lambda name: None)
    for name in ("FASTTX_NVCC", "CUDA_HOME", "CUDA_PATH", "FASTTX_CUDA"):
        monkeypatch.delenv(name, raising=False)
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("FASTTX_NVCC", str(nvcc))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libtorch_cuda.so").touch()
    assert setup_script.find_nvcc(tmp_path) is None, "there is nothing for it to compile"
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "op.cu").touch()
    assert setup_script.find_nvcc(tmp_path) == str(nvcc)
    (tmp_path / "lib/libtorch_cuda.so").unlink()
    assert setup_script.find_nvcc(tmp_path) is None, "this torch could not run them"
    monkeypatch.setenv("FASTTX_CUDA", "1")
    assert setup_script.find_nvcc(tmp_path) == str(nvcc)
    monkeypatch.setenv("FASTTX_CUDA", "0")
    assert setup_script.find_nvcc(tmp_path) is None
    monkeypatch.setenv("FASTTX_CUDA", "1")
    monkeypatch.setattr(setup_script.os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match="no nvcc was found"):
        setup_script.find_nvcc(tmp_path)


def test_rooms_are_installed_inside_fasttx(setup_script):
    packages = setup_script.packages()
    assert packages["fasttx"] == "fasttx"
    assert packages["fasttx.kernels"] == "kernels"
    assert packages["fasttx.benchmarks"] == "benchmarks"
    for file in ROOT.glob("fasttx/**/*.py"):
        folder = file.parent.relative_to(ROOT).as_posix()
        assert packages[folder.replace("/", ".")] == folder


@pytest.fixture
def tool(monkeypatch):
    """tools/environment.py with a pip that only writes down its arguments: (module, calls)."""
    tool = load_script(ROOT / "tools" / "environment.py")
    calls = []

    def run(command, **kwargs):
        calls.append([word for word in command[3:] if word != "-q"])
        return subprocess.CompletedProcess(command, 1 if "+cpu" in command[-1] else 0)

    monkeypatch.setattr(tool.subprocess, "run", run)
    monkeypatch.delenv("TORCH_INSTALL", raising=False)
    tool.calls = calls
    return tool


def test_each_torch_gets_its_triton(tool):
    assert tool.triton_for("2.13.0+cpu") == "triton==3.7.1"
    assert tool.triton_for("2.11.0") == "triton==3.6.0"
    assert tool.triton_for("9.9.0") == "triton>=3.6"
    assert not [name for name in tool.requirements() if re.match(r"torch\b", name)]


def test_torch_is_installed_as_asked(tool, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_INSTALL", "torch==2.13.0 --index-url 'file:///some where'")
    tool.install_torch("python")
    assert tool.calls == [["install", "torch==2.13.0", "--index-url", "file:///some where"]]
    assert "TORCH_INSTALL" in capsys.readouterr().err


def test_cpu_build_of_torch_is_looked_for_first(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "has_gpu", lambda: False)
    tool.install_torch("python")
    assert tool.calls == [["install", "torch==2.13.0+cpu"], ["install", "torch==2.13.0"]]
    said = capsys.readouterr().err
    assert "200 MB" in said
    assert "2.5 GB" in said
    assert "TORCH_INSTALL" in said


def test_gpu_machine_gets_the_standard_torch(tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "has_gpu", lambda: True)
    tool.install_torch("python")
    assert tool.calls == [["install", "torch==2.13.0"]]
    assert "2.5 GB" in capsys.readouterr().err


def test_failed_install_of_torch_is_one_sentence(tool, monkeypatch):
    monkeypatch.setattr(tool, "has_gpu", lambda: True)
    monkeypatch.setattr(tool, "pip", lambda *args, **kwargs: 1)
    with pytest.raises(SystemExit, match=r"torch 2\.13\.0 could not be installed"):
        tool.install_torch("python")


@pytest.mark.slow
def test_wheel_runs_where_there_is_no_compiler(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps"]
    subprocess.run([*command, "-w", str(tmp_path), "."], cwd=ROOT, check=True, env=environment())
    (wheel,) = tmp_path.glob("fasttx-*.whl")
    assert wheel.name.endswith("-manylinux_2_34_x86_64.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("libfasttx.so", "kernels/attention.py", "benchmarks/run.py", "py.typed"):
        assert f"fasttx/{name}" in names

    # A new environment that sees the torch here, not the packages installed for development.
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    python = str(home / "bin" / "python")
    (site,) = home.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    bare = {"PATH": str(home / "bin"), "HOME": str(tmp_path), "FASTTX_STRICT": "1"}
    said = run_attention(python, env=bare, cwd=tmp_path)
    assert said["file"].startswith(str(site))
    assert said["backend"] == "cpu"


@pytest.mark.slow
def test_sdist_holds_every_source(tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=environment())
    (sdist,) = tmp_path.glob("*.tar.gz")
    out = subprocess.run(["tar", "-tzf", sdist], capture_output=True, text=True, check=True).stdout
    names = {name.partition("/")[2] for name in out.splitlines()}
    rooms = ("csrc", "kernels", "benchmarks", "fasttx", "tests")
    files = [p for room in rooms for p in ROOT.glob(f"{room}/**/*.*") if p.is_file()]
    wanted = {p.relative_to(ROOT).as_posix() for p in files if p.suffix in (".py", ".cpp", ".h")}
    assert wanted - names == set()
