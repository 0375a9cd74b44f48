"""Text from text, with the model's own tokenizer and no other."""

import pytest

import fasttx
from fasttx.training import (
    CausalLM,
    Tokenizer,
    TokenizerMismatch,
    fit,
    generate_text,
)

from . import corpus, tiny
from .test_models import create


def test_a_trained_model_writes_text_and_refuses_another_tokenizer(tmp_path):
    tokenizer = corpus.tokenizer("word", template="bos")
    examples = CausalLM(tokenizer, 64, layout="flat").examples(corpus.stream(tokenizer, 300))
    fit(create("gpt2", "causal_lm", tokenizer), examples, tmp_path, steps=60, batch_size=8,
        learning_rate=2e-2, tokenizer=tokenizer)  # fmt: skip
    model = fasttx.from_pretrained(tmp_path / "model")
    own = Tokenizer.load(tmp_path / "model")
    texts = ["The river", "The bird keeps the"]
    both = generate_text(model, own, texts, max_new_tokens=8)
    assert both[0].split()[0] in corpus.VERBS and both[1].split()[0] in corpus.NOUNS
    assert both == [generate_text(model, own, t, max_new_tokens=8)[0] for t in texts]
    with pytest.raises(TokenizerMismatch, match="trained with the tokenizer sha256"):
        generate_text(model, corpus.tokenizer("word", 50), "The river")
    with pytest.raises(TokenizerMismatch, match="another tokenizer"):
        generate_text(model, corpus.tokenizer("bpe"), "The river")
    with pytest.raises(ValueError, match="texts must each have a token"):
        generate_text(model, own, [])


@pytest.mark.parametrize("theirs", [False, True])
def test_seq2seq_models_write_their_target(theirs):
    tokenizer = corpus.tokenizer("word", template="eos")
    make = tiny.model("t5", tokenizer) if theirs else create("t5", "conditional_generation",
                                                             tokenizer)  # fmt: skip
    texts = generate_text(make.eval(), tokenizer, ["The <extra_id_0> keeps", "a"],
                          max_new_tokens=5)  # fmt: skip
    assert len(texts) == 2 and all(isinstance(t, str) for t in texts)
