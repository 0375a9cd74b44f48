"""What a load costs."""

import subprocess
import sys

import pytest
import torch

from fasttx import models

PEAK = """
import resource, sys
import torch
from safetensors import safe_open
import fasttx
from fasttx import models
torch.set_num_threads(1)
models.create("gpt2", "causal_lm", vocab_size=10, n_embd=4, n_layer=1, n_head=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dtype = getattr(torch, sys.argv[2])
model = fasttx.from_pretrained(sys.argv[1], dtype=dtype)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 / sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory(dtype, tmp_path):
    """The peak of a load, a 230 MB GPT-2 with its transposed weights, is its weights alone."""
    options = {"vocab_size": 20000, "n_embd": 768, "n_layer": 6, "n_positions": 128}
    model = models.create("gpt2", "causal_lm", **options)
    model.save_pretrained(tmp_path)
    del model
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, dtype], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) <= 1.2, done.stdout


def test_parameters_are_ones_own(tmp_path):
    """Nothing is a view of the file: it may change or go while the model trains."""
    model = models.create("gpt2", "causal_lm", vocab_size=61, n_embd=24, n_layer=1, n_head=3)
    model.save_pretrained(tmp_path)
    loaded = models.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert theirs.requires_grad and theirs.is_contiguous() and theirs.data_ptr() % 64 == 0
    assert not any(b.is_meta for b in loaded.buffers())


def test_nothing_of_transformers_is_imported(tmp_path):
    models.create("t5", "conditional_generation", vocab_size=61, d_model=24, d_kv=8, num_heads=3,
                  d_ff=40, num_layers=1).save_pretrained(tmp_path)  # fmt: skip
    code = (
        "import sys, torch\n"
        "sys.modules['transformers'] = None\n"
        "import fasttx\n"
        "assert 'fasttx.models' not in sys.modules and 'safetensors' not in sys.modules\n"
        "model = fasttx.from_pretrained(sys.argv[1])\n"
        "ids = torch.ones(1, 4).long()\n"
        "assert model(ids, decoder_input_ids=ids).logits.shape == (1, 4, 61)\n"
        "model.save_pretrained(sys.argv[1])\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
