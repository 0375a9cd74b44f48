"""Train under torchrun: torchrun ... parallel_run.py FOLDER OPTIONS-AS-JSON. Each process writes
the losses it ends with."""

import json
import os
import sys
from pathlib import Path

import torch

from fasttx.training import fit, loop
from tests.training import corpus, toy


def run(folder, **changed):
    torch.set_num_threads(1)
    loop.plot_losses = lambda folder: None
    tokenizer = corpus.tokenizer("word")
    model = toy.model(tokenizer, dropout=changed.pop("dropout", 0.0))
    given = {"steps": 6, "batch_size": 8, "save_every": 3, "evaluate_every": 2, "log_every": 2}
    result = fit(model, toy.examples(tokenizer), folder, tokenizer=tokenizer, device="cpu",
                 evaluation=toy.examples(tokenizer, 9, seed=1), **given | changed)  # fmt: skip
    return model, result


if __name__ == "__main__":
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    _, result = run(folder, **options)
    rank = os.environ["RANK"]
    (folder / f"rank{rank}.json").write_text(
        json.dumps([result.steps, result.loss, result.evaluation_loss])
    )
