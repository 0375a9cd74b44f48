"""Two processes under torchrun train what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from . import corpus
from .parallel_run import run
from .test_config import CONFIG
from .test_loop import files, log

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def start(*args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, "-m", *args], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def torchrun(folder, **options) -> list:
    start("tests.training.parallel_run", str(folder), json.dumps(options))
    ranks = [json.loads((folder / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert ranks[0] == ranks[1]
    return ranks[0]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro", [4, 2])
def test_two_processes_are_one(parallel, micro, tmp_path):
    """Loss weighting: rows differ in how many labels they have."""
    _, whole = run(tmp_path / "one")
    steps, loss, held = torchrun(tmp_path / "two", parallel=parallel, micro_batch_size=micro)
    assert steps == whole.steps
    assert loss == pytest.approx(whole.loss, rel=1e-5)
    assert held == pytest.approx(whole.evaluation_loss, rel=1e-5)
    one, two = (load_file(tmp_path / n / "model/model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_go_on_bit_for_bit(parallel, tmp_path):
    import shutil

    torchrun(tmp_path / "whole", parallel=parallel, dropout=0.1)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000006")
    torchrun(tmp_path / "again", parallel=parallel, dropout=0.1, resume=True)
    assert files(tmp_path / "again") == files(tmp_path / "whole")
    assert log(tmp_path / "again") == log(tmp_path / "whole")


def test_the_command_runs_under_torchrun(tmp_path):
    """One process trains the tokenizer, whose ties may fall otherwise in another."""
    (tmp_path / "text.txt").write_text("\n".join(corpus.documents(120)))
    given = CONFIG | {"tokenizer": {"kind": "wordpiece", "vocab_size": 300}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given))
    done = start("fasttx.cli", "train", str(tmp_path / "config.yaml"))
    assert done.stdout.count("run/model: 6 steps") == 1
    assert (tmp_path / "run/model/tokenizer.json").is_file()
