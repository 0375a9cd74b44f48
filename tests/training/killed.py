"""Train in a process that is killed at the n-th call of a function of the loop's: python -m
tests.training.killed FOLDER WHERE N."""

import os
import shutil
import signal
import sys

import safetensors.torch
import torch

from fasttx.training import checkpoint as files
from fasttx.training import fit, loop

from . import corpus, toy

OPTIONS = {"steps": 12, "batch_size": 8, "micro_batch_size": 4, "log_every": 5, "save_every": 3,
           "evaluate_every": 4, "keep": 1}  # fmt: skip
PLACES = {
    "step": (torch.optim.AdamW, "step"),
    "batch": (loop, "labelled"),
    "tensors": (safetensors.torch, "save_file"),
    "disk": (os, "fsync"),
    "rename": (files.Path, "rename"),
    "remove": (shutil, "rmtree"),
}


def run(folder) -> None:
    torch.set_num_threads(1)
    loop.plot_losses = lambda folder: None
    tokenizer = corpus.tokenizer("word")
    fit(toy.model(tokenizer), toy.examples(tokenizer), folder, tokenizer=tokenizer, resume=True,
        evaluation=toy.examples(tokenizer, 9, seed=1), **OPTIONS)  # fmt: skip


def plant(where: str, call: int) -> None:
    """Killed after half of the effect where there is one: the call happens, its caller never
    knows."""
    holder, name = PLACES[where]
    own, left = getattr(holder, name), [call]

    def deadly(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            own(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args, **kwargs)

    setattr(holder, name, deadly)


if __name__ == "__main__":
    if sys.argv[2:]:
        plant(sys.argv[2], int(sys.argv[3]))
    run(sys.argv[1])
