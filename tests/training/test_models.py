"""The objectives' batches in fasttx's own models."""

import itertools

import pytest
import torch

import fasttx
from fasttx.training import CausalLM, MaskedLM, SpanCorruption, TextInfilling, fit
from fasttx.training.models import _tokens

from . import corpus

SIZES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "bert": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 64},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 64,
             "max_position_embeddings": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.tokenizer("word")


def create(family: str, head: str, tokenizer, **changed):
    torch.manual_seed(0)
    sizes = _tokens(tokenizer, family) | SIZES[family] | changed
    return fasttx.models.create(family, head, **sizes)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_packed_documents_do_not_see_each_other(family, tokenizer):
    examples = CausalLM(tokenizer, 64, layout="flat").examples(corpus.stream(tokenizer, 40))
    batch = examples.batch([0, 1])
    model = create(family, "causal_lm", tokenizer).eval()
    with torch.no_grad():
        packed = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[0]
        bounds = batch["cu_seq_lens_q"].tolist()
        assert len(bounds) > 5
        ids = batch["input_ids"]
        alone = [model(ids[:, a:b]).logits[0] for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=2e-5, rtol=1e-4)
    rows = CausalLM(tokenizer, 64).examples(corpus.stream(tokenizer, 40))
    with pytest.raises(ValueError, match='use layout="flat"'):
        fit(model, rows, "unused", steps=1, batch_size=2)


@pytest.mark.parametrize(
    ("family", "head", "objective"),
    [
        ("gpt2", "causal_lm", CausalLM),
        ("bloom", "causal_lm", CausalLM),
        ("bert", "masked_lm", MaskedLM),
        ("t5", "conditional_generation", SpanCorruption),
        ("bart", "conditional_generation", TextInfilling),
    ],
)
def test_models_train_and_remember_their_tokenizer(family, head, objective, tokenizer, tmp_path):
    from fasttx.training import Tokenizer, TokenizerMismatch, check_tokenizer

    options = {"layout": "flat"} if objective is CausalLM else {}
    examples = objective(tokenizer, 32, **options).examples(corpus.stream(tokenizer))
    model = create(family, head, tokenizer)
    given = {"steps": 25, "batch_size": 8, "learning_rate": 1e-2, "log_every": 5}
    again = family == "t5"
    result = fit(model, examples, tmp_path, tokenizer=tokenizer, gradient_checkpointing=again,
                 **given)  # fmt: skip
    assert result.loss < 4.2  # of about 4.65 at first
    again = fasttx.from_pretrained(tmp_path / "model")
    own = Tokenizer.load(tmp_path / "model")
    check_tokenizer(again, own)
    with pytest.raises(TokenizerMismatch, match="was trained with"):
        check_tokenizer(again, corpus.tokenizer("word", size=50))
    batch = examples.batch([0, 1])
    with torch.no_grad():
        assert torch.equal(again(**batch).loss, model.eval()(**batch).loss)


@pytest.mark.parametrize("library", ["fasttx", "transformers"])
def test_evaluation_makes_no_logits_and_no_dropout(library, tokenizer, tmp_path):
    from . import tiny

    examples = MaskedLM(tokenizer, 32).examples(corpus.stream(tokenizer, 40))
    model = create("bert", "masked_lm", tokenizer)
    if library == "transformers":
        model = tiny.model("bert", tokenizer)
        fasttx.patch(model)
    seen = []
    model.register_forward_hook(lambda m, args, out: seen.append(out))
    result = fit(model, examples, tmp_path, steps=1, batch_size=8, evaluation=examples,
                 learning_rate=0.0)  # fmt: skip
    assert len(seen) > 2 and all(out.logits is None for out in seen)
    with torch.no_grad():
        whole = model.eval()(**examples.batch(range(len(examples))))
    assert whole.logits is not None
    assert result.evaluation_loss == pytest.approx(whole.loss.item(), rel=1e-5)
