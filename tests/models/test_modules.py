"""The models are modules like any other: copied, pickled, compiled, cast, trained with dropout."""

import copy
import pickle
import random

import pytest
import torch

from fasttx import models

from ..integrations.hf_models import hold
from .random_models import SEQ2SEQ, batch, fill_padding, model, shown
from .test_families import results

SMALL = {
    "bert": ("masked_lm", {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2,
                           "intermediate_size": 40}),
    "gpt2": ("causal_lm", {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_positions": 32}),
    "bloom": ("causal_lm", {"hidden_size": 24, "n_head": 3, "n_layer": 2}),
    "t5": ("conditional_generation", {"d_model": 24, "d_kv": 8, "num_heads": 3, "d_ff": 40,
                                      "num_layers": 2}),
}  # fmt: skip


def made(family: str):
    head, options = SMALL[family]
    torch.manual_seed(0)
    return models.create(family, head, vocab_size=61, pad_token_id=0, **options).eval()


def inputs(family: str) -> dict:
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None]
    given = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
    return given | ({"decoder_input_ids": ids} if family in SEQ2SEQ else {})


@pytest.mark.parametrize("family", SMALL)
def test_copies(family):
    ours, given = made(family), inputs(family)
    expected = ours(**given).logits
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(**given).logits, expected)
        assert len(list(copied.parameters())) == len(list(ours.parameters()))
    other = made(family)
    other.load_state_dict({k: v + 1 for k, v in ours.state_dict().items()})
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(**given).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", SMALL)
def test_compiled(family):
    ours, given = made(family), inputs(family)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    seen = given["attention_mask"].bool() if family not in SEQ2SEQ else slice(None)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits[seen], ours(**given).logits[seen])
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    torch.testing.assert_close(
        compiled(**given, labels=labels).loss, ours(**given, labels=labels).loss
    )


@pytest.mark.parametrize("family", SMALL)
def test_dropout(family):
    ours, given = made(family).train(), inputs(family)
    one, two = (ours(**given).hidden for _ in range(2))
    assert (family == "bloom") == torch.equal(one, two)  # its config has none
    torch.manual_seed(3)
    one = ours(**given).hidden
    torch.manual_seed(3)
    assert torch.equal(one, ours(**given).hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["BertForMaskedLM", "RobertaForMaskedLM", "GPT2LMHeadModel", "BloomForCausalLM",
     "T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel"],
)  # fmt: skip
def test_halves(name, dtype, tmp_path):
    pytest.importorskip("transformers", reason="transformers is not installed")
    rng = random.Random(f"halves {name}")
    theirs, _ = model(name, rng)
    theirs = theirs.to(dtype)
    theirs.save_pretrained(tmp_path)
    ours, exact = models.from_pretrained(tmp_path), copy.deepcopy(theirs).double()
    assert {p.dtype for p in ours.parameters()} == {dtype}
    found = []
    for _ in range(4):
        given = fill_padding(batch(name, rng), theirs.config.pad_token_id)
        with torch.no_grad():
            logits = (ours(**given).logits, *(results(m, given)["logits"] for m in (theirs, exact)))
        found.append([shown(t, given).flatten() for t in logits])
    hold(name, *(torch.cat(part) for part in zip(*found, strict=True)))


def test_an_output_layer_with_a_hook():
    """What is put in the place of a layer, or listens to it, is called."""
    ours = models.create(
        "bert", "masked_lm", vocab_size=61, tie_word_embeddings=False, **SMALL["bert"][1]
    )
    ids, seen = inputs("bert")["input_ids"], []
    for layer in (ours.head.out, ours.head.dense):
        layer.register_forward_hook(lambda module, given, out: seen.append(module))
    plain = ours.train()(ids, labels=ids)
    assert seen == [ours.head.dense, ours.head.out] and plain.logits.shape == (2, 7, 61)
    ours.head.out = torch.nn.Sequential(ours.head.out)
    ours.head.out.weight = ours.head.out[0].weight
    ours.eval()
    torch.testing.assert_close(ours(ids, labels=ids).loss, ours(ids, labels=ids, logits=False).loss)
