"""docs/models.md: its examples run, in order, on small folders of each family."""

import re
from pathlib import Path

import pytest
import torch

from fasttx import models

TEXT = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
_TOKENS = {"vocab_size": 61, "pad_token_id": 0, "eos_token_id": 2}
_BERT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, **_TOKENS,
         "intermediate_size": 40}  # fmt: skip
FOLDERS = {
    "bert": ("base", _BERT),
    "roberta": ("masked_lm", _BERT | {"pad_token_id": 1}),
    "gpt2": ("causal_lm", {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, **_TOKENS}),
    "bloom": ("causal_lm", {"hidden_size": 24, "n_layer": 2, "n_head": 3, **_TOKENS}),
    "t5": ("conditional_generation",
           {"d_model": 24, "d_kv": 8, "num_heads": 3, "d_ff": 40, "num_layers": 2, **_TOKENS}),
    "bart": ("conditional_generation",
             {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 40,
              "encoder_attention_heads": 3, "decoder_attention_heads": 3, "decoder_ffn_dim": 40,
              **_TOKENS}),
}  # fmt: skip


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples(number, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    example, names = EXAMPLES[number], {}
    for family in re.findall(r'"models/(\w+)"', example):
        if family in FOLDERS:
            head, options = FOLDERS[family]
            models.create(family, head, **options).save_pretrained(f"models/{family}")
    exec(example.replace("lr=5e-5", "lr=1e-2"), names)  # a width of 24 learns at another rate
    printed = capsys.readouterr().out
    if "classify" in TEXT.partition(example)[0][-60:]:
        assert printed == "tensor([0, 2])\n"
    if number == 0:
        assert "torch.Size([2, 3, 61]) torch.Size([2, 3, 24])" in printed
        assert (tmp_path / "models" / "again" / "model.safetensors").exists()


def test_every_head_and_class_is_named():
    for head in models.HEADS:
        assert f"`{head}` | `{models.heads.MODELS[head].__name__}`" in TEXT
    for family in models.FAMILIES.values():
        for name in {*family.architectures, *family.encoders}:
            assert name in models.HEADS
