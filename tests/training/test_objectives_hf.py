"""The objectives' batches in transformers' models, their own and patched."""

import itertools

import pytest
import torch

import fasttx
from fasttx.training import CausalLM, MaskedLM, SpanCorruption, TextInfilling, fit

from . import corpus, tiny


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.tokenizer()


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("bert", MaskedLM),
        ("roberta", MaskedLM),
        ("gpt2", CausalLM),
        ("bloom", CausalLM),
        ("t5", SpanCorruption),
        ("bart", TextInfilling),
    ],
)
def test_models_take_the_batches(family, objective, patched, tokenizer):
    options = {"packed": False} if family == "bloom" else {}
    examples = objective(tokenizer, 32, **options).examples(corpus.stream(tokenizer, 40))
    model = tiny.model(family, tokenizer).train()
    if patched:
        fasttx.patch(model, strict=True)
    loss = model(**examples.batch([0, 1, 2])).loss
    loss.backward()
    assert loss.isfinite() and loss.item() > 1
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("layout", ["rows", "flat"])
def test_documents_of_a_row_do_not_see_each_other(layout, tokenizer):
    """A row's logits are those of its documents alone."""
    stream = corpus.stream(tokenizer, 40)
    examples = CausalLM(tokenizer, 64, layout=layout).examples(stream)
    batch = examples.batch([0, len(examples) - 1])  # the last is shorter
    model = tiny.model("gpt2", tokenizer).eval()
    if layout == "flat":
        fasttx.patch(model)
    else:
        model.config.use_cache = False
    with torch.no_grad():
        packed = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.flatten(0, 1)
        ids, starts = batch["input_ids"].flatten(), batch["position_ids"].flatten() == 0
        bounds = [*starts.nonzero().flatten().tolist(), len(ids)]
        assert len(bounds) > 4
        alone = [model(ids[None, a:b]).logits[0] for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-5, rtol=1e-4)


def test_patched_loss_makes_no_logits_and_is_theirs(tokenizer):
    """Through linear_cross_entropy, which leaves positions without a label out of every product."""
    batch = MaskedLM(tokenizer, 32).examples(corpus.stream(tokenizer, 40)).batch([0, 1, 2])
    model = tiny.model("bert", tokenizer, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    expected = model.train()(**batch)
    fasttx.patch(model)
    found = model(**batch)
    assert expected.logits is not None and found.logits is None
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=1e-5)


def test_fit_trains_packed_rows_without_a_cache(tokenizer, tmp_path):
    """With one transformers' models would take the documents of a row for one."""
    model, seen = tiny.model("gpt2", tokenizer), []
    model.register_forward_pre_hook(lambda m, args: seen.append(m.config.use_cache))
    examples = CausalLM(tokenizer, 64).examples(corpus.stream(tokenizer, 40))
    fit(model, examples, tmp_path, steps=1, batch_size=4)
    assert seen == [False] and model.config.use_cache
