"""The command line: what it prints, and one line with exit code 2 for wrong input."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fasttx
from fasttx import cli, native

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command; (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*args):
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(args))
        out = capsys.readouterr()
        return stopped.value.code or 0, out.out, out.err

    return run


def test_help_and_version(run):
    for args in ([], ["--help"], ["explain"], ["explain", "attention", "--help"]):
        code, out, _ = run(*args)
        assert code == 0
        assert "Usage: fasttx" in out
    assert run("--version") == (0, fasttx.__version__ + "\n", "")


def test_info_says_what_is_there_and_why_not(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, _ = run("info")
    assert code == 0
    assert torch.__version__ in out
    assert ", ".join(native.supported_levels()) in out
    assert re.search(r"attention_fwd +cpu +reference +usable", out)
    assert re.search(r"attention_fwd +cuda +triton +(torch .* without CUDA|no CUDA device)", out)
    assert (native.unavailable() or f"runs {native.cpu_isa()} kernels") in out


def test_info_gives_the_reason_of_a_missing_library(run, monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: "the reason")
    _, out, _ = run("info")
    assert "not available: the reason" in out


def test_info_lists_every_variable_that_is_read(run):
    _, out, _ = run("info")
    sources = [ROOT / "setup.py", *ROOT.glob("fasttx/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    sources += [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("benchmarks/**/*.py")]
    read = r"(?:environ(?:\.get\(|\[)|getenv\()\s*\"(FASTTX_\w+)\""
    names = {name for path in sources for name in re.findall(read, path.read_text())}
    assert {"FASTTX_NATIVE", "FASTTX_CPU_ISA", "FASTTX_CUDA"} <= names
    for name in names:
        assert re.search(rf"^{name} ", out, re.MULTILINE), f"{name} is read, but not listed"


def test_explain_shows_what_runs(run):
    code, out, _ = run("explain", "attention", "--shape", "2,4,64,32", "--dtype", "fp64")
    assert code == 0
    assert re.search(r"-> +attention_fwd +reference +runs", out)
    assert re.search(r"-> +attention_bwd +reference +runs", out)
    assert re.search(r"attention_fwd +cpu +needs float32 or bfloat16 or float16, got float64", out)


def test_explain_takes_every_feature(run):
    shapes = ["--shape", "2,4,64,32", "--kv-shape", "2,2,80,32,48", "--dtype", "fp32"]
    features = ["--lower-right", "--mask", "bool:2,1,1,80", "--window", "16,", "--softcap", "30"]
    features += ["--position-bias", "relative", "--dropout", "0.1", "--backend", "reference"]
    code, out, err = run("explain", "attention", *shapes, *features)
    assert (code, err) == (0, "")
    assert re.search(r"-> +attention_fwd +reference +runs", out)
    assert run("explain", "attention", "--causal", "--position-bias", "alibi")[0] == 0


def test_explain_needs_no_memory_for_big_shapes(run):
    assert run("explain", "attention", "--shape", "4096,128,1048576,128")[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("frobnicate", "No such command 'frobnicate'"),
        ("info --frobnicate", "No such option: --frobnicate"),
        ("explain rmsnorm", "No such command 'rmsnorm'"),
        ("explain attention --shape 1,2,3", "--shape 1,2,3: give 4 sizes like 8,12,512,64"),
        ("explain attention --shape 1,2,x,4", "--shape 1,2,x,4: give 4 sizes"),
        ("explain attention --dtype int8", "--dtype int8: choose one of fp32, bf16, fp16, fp64"),
        ("explain attention --device tpu", "--device tpu: choose cpu or cuda"),
        ("explain attention --mask causal", "--mask causal: give"),
        ("explain attention --window 4", "--window 4: give LEFT,RIGHT"),
        ("explain attention --position-bias sin", "--position-bias sin: choose alibi or relative"),
        ("explain attention --dropout 2", "dropout_p"),
        ("explain attention --dropout x", "Invalid value for '--dropout'"),
        ("explain attention --backend x", "backend"),
        ("explain attention --kv-shape 8,5,512,64", "head"),
    ],
)
def test_wrong_input_is_one_line(run, args, message):
    code, out, err = run(*args.split())
    assert (code, out) == (2, "")
    assert err.startswith("fasttx: ")
    assert err.count("\n") == 1
    assert message in err


def test_cuda_without_cuda_is_one_line(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = run("explain", "attention", "--device", "cuda")
    assert code == 2
    assert re.fullmatch(r"fasttx: --device cuda: (torch .* without CUDA|no CUDA .* visible)\n", err)


def test_wrong_environment_is_one_line(run, monkeypatch):
    monkeypatch.setenv("FASTTX_CPU_ISA", "avx1024")
    code, _, err = run("info")
    assert code == 2
    assert "FASTTX_CPU_ISA='avx1024' is unknown" in err


def test_bench_is_found(run):
    code, out, _ = run("bench", "--help")
    assert code == 0
    assert "Usage: fasttx bench" in out
    code, _, err = run("bench", "--no-such-option")
    assert code == 2
    assert err.count("\n") == 1


def test_command_is_installed():
    command = Path(sys.executable).with_name("fasttx")
    if not command.is_file():
        pytest.skip("fasttx is not installed in this environment")
    out = subprocess.run([command, "--version"], capture_output=True, text=True, cwd=os.sep)
    assert out.stdout.strip() == fasttx.__version__
