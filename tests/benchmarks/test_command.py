"""What can be asked for; wrong input is one clear line and exit code 2."""

import pytest
import torch
from fasttx.benchmarks import machine, ops, options
from fasttx.benchmarks import run as command
from fasttx.benchmarks.ops.attention import full_cases, quick_cases
from fasttx.benchmarks.ops.attention_case import Case


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["atention"], "unknown op or model 'atention'"),
        (["op", "bert"], "unknown op 'bert'"),
        (["model", "gpt9"], "unknown model 'gpt9'"),
        (["layer", "gpt9"], "unknown layer 'gpt9'"),
        (["train", "gpt9"], "unknown train 'gpt9'"),
        (["attention", "--dtype", "int3"], "unknown dtype 'int3': choose from fp32, bf16, fp16"),
        (["attention", "--seqlen", "128,x"], "got 'x'"),
        (["attention", "--seqlen", "0"], "got '0'"),
        (["attention", "--seqlen", "99999999"], "from 1 to 131072"),
        (["attention", "--head-dim", "0"], "--head-dim"),
        (["attention", "--threads", "4096"], "--threads must be whole numbers from 1 to"),
        (["attention", "--provider", "magic"], "unknown provider 'magic'"),
        (["attention", "--backend", "magic"], "unknown backend 'magic'"),
        (["attention", "--direction", "sideways"], "unknown direction 'sideways'"),
        (["attention", "--device", "toaster"], "unknown device 'toaster'"),
        (["attention", "--suite", "slow"], "unknown suite 'slow'"),
        (["attention", "--quick", "--full"], "choose one suite"),
        (["attention", "--budget", "-1"], "--budget"),
        (["attention", "--no-such-option"], "--no-such-option"),
        (["attention", "--threads", "0"], "the cores usable here, got '0'"),
        (["attention", "--out", __file__], "is a file"),
        (["attention", "--csv", "."], "--csv '.' is a folder"),
        (["call_overhead", "--seqlen", "8"], "nothing to run: call_overhead: it has no --seqlen"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, expected, capsys):
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("fasttx bench: ")
    assert expected in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys):
    assert command.main(["attention", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {"ops": ("attention",), "models": ("bert",)}),
        (["attention"], {"ops": ("attention",)}),
        (["op", "attention", "model", "bert"], {"ops": ("attention",), "models": ("bert",)}),
        (["model"], {"models": options.MODELS}),
        (["op"], {"ops": ops.names()}),
        (["op", "model", "bert"], {"ops": ops.names(), "models": ("bert",)}),
        (["bert", "attention", "bert"], {"ops": ("attention",), "models": ("bert",)}),
        (
            ["layer", "gpt2", "train", "gpt2", "toy-t5"],
            {"layers": ("gpt2",), "training": ("gpt2", "toy-t5")},
        ),
        (["gpt2", "generate", "gpt2"], {"models": ("gpt2",), "generation": ("gpt2",)}),
        (["layer"], {"layers": options.KINDS["layer"]}),
    ],
)
def test_targets(words, expected):
    assert {k: v for k, v in options.targets(words).items() if v} == expected


def test_quick_covers_the_three_topologies_forward_and_backward():
    cases = quick_cases(("fp32", "bf16"))
    assert {case.topology.split()[0] for case in cases} == {"encoder", "decoder", "seq2seq"}
    assert {case.dtype for case in cases} == {"fp32", "bf16"}
    assert options.Options().directions == ("forward", "backward")
    assert {*cases} <= {*full_cases(("fp32", "bf16"))}


def test_flops_are_two_a_multiply_add():
    case = Case("encoder", 2, 3, 5, 7, 4, "fp32")
    assert case.flops("forward") == 2 * (2 * 3 * 5 * 7) * 4 * 2
    assert case.flops("step") == case.flops("forward") + case.flops("backward")


def test_machine_class_names_vendor_core_and_instructions():
    facts = {"cpu": "AMD EPYC 9654", "cpu_family": 25, "cpu_model": 0x11, "isa": "avx512_bf16"}
    assert machine.machine_class(facts) == "cpu-amd-zen4-avx512_bf16"
    assert machine.isa({"avx2", "fma"}) == "avx2"
    assert machine.isa({"avx512f", "avx512bw", "avx512dq", "avx512vl"}) == "avx512"
    assert machine.describe()["class"]
