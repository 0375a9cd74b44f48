"""Likelihoods of texts against sums written out in float64, and answers chosen by them."""

import itertools
import re
from pathlib import Path

import pytest
import torch

from fasttx import models
from fasttx.training import TokenizerMismatch, log_likelihood, train_tokenizer, zero_shot
from fasttx.training.likelihood import _windows

from . import corpus

TEXTS = corpus.documents(5, seed=2)
SIZES = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 160},
         "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2}}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return corpus.tokenizer(template="bos")


@pytest.fixture(params=SIZES, scope="module")
def model(request, tokenizer):
    torch.manual_seed(1)
    made = models.create(request.param, "causal_lm", vocab_size=tokenizer.vocab_size,
                         **SIZES[request.param])  # fmt: skip
    for parameter in made.parameters():  # far from the uniform distribution of initial values
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made


def surprise(model, ids: list[int], first: int) -> float:
    """sum ln P of ids[first:], each after all before it."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0].double()
    found = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return float(found[first - 1 :].sum())


def test_texts_of_many_lengths(model, tokenizer):
    found = log_likelihood(model, tokenizer, TEXTS, ends=True, batch_size=3)
    rows = [[tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] for text in TEXTS]
    assert found.tokens.tolist() == [len(row) - 1 for row in rows]
    for total, row in zip(found.total, rows, strict=True):
        assert float(total) == pytest.approx(surprise(model, row, 1), rel=1e-5)


def test_after_a_prompt(model, tokenizer):
    texts, prompts = [" finds the stone", "keeps"], ["The bird", "The river "]
    found = log_likelihood(model, tokenizer, texts, prompts)
    for i in range(2):
        before, after = tokenizer.encode(prompts[i]), tokenizer.encode(prompts[i] + texts[i])
        if after[: len(before)] != before:
            after = before + tokenizer.encode(texts[i])
        row, first = [tokenizer.bos, *after], 1 + len(before)
        assert found.tokens[i] == len(row) - first
        assert float(found.total[i]) == pytest.approx(surprise(model, row, first), rel=1e-5)


def test_a_text_longer_than_the_context(model, tokenizer):
    """Each token after as much as the windows let it see."""
    text, length = " ".join(TEXTS), 20
    row = [tokenizer.bos, *tokenizer.encode(text)]
    expected, first = surprise(model, row[:20], 1), 20
    while first < len(row):
        stop = min(len(row), first + 10)
        expected += surprise(model, row[stop - 20 : stop], first - stop + 20)
        first = stop
    found = log_likelihood(model, tokenizer, [text], length=length)
    assert found.tokens.tolist() == [len(row) - 1]
    assert found.total.item() == pytest.approx(expected, rel=1e-5)


def test_windows_count_every_token_once_with_half_a_context():
    sizes, firsts, lengths = (2, 3, 7, 19, 20, 21, 50, 101), (1, 2, 5, 11, 40), (2, 3, 10, 21, None)
    for size, first, length in itertools.product(sizes, firsts, lengths):
        counted = []
        for window, start in _windows(list(range(size)), first, length):
            assert length is None or len(window) <= length
            for place in range(start, len(window)):
                whole = window[place]
                assert place >= (whole if length is None else min(whole, length // 2))
                counted.append(window[place])
        assert counted == list(range(first, size))


def test_transformers_models_say_the_same(model, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.train()
    found = log_likelihood(theirs, tokenizer, TEXTS, "The", ends=True, length=24)
    ours = log_likelihood(model, tokenizer, TEXTS, "The", ends=True, length=24)
    torch.testing.assert_close(found.total, ours.total, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.tokens, ours.tokens)
    assert theirs.training and all(module.training for module in theirs.modules())


def test_answers_of_one_token_are_a_distribution(model, tokenizer):
    """Over the whole vocabulary their probabilities add up to 1."""
    row = torch.tensor([[tokenizer.bos, *tokenizer.encode("The bird")]])
    with torch.no_grad():
        expected = model.eval()(row).logits[0, -1].double().log_softmax(-1)
    words = [" finds", " keeps", " the", " opens"]
    ids = [tokenizer.encode(word) for word in words]
    assert all(len(one) == 1 for one in ids)
    scores = zero_shot(model, tokenizer, ["The bird"], words)
    torch.testing.assert_close(scores[0], expected[[i for (i,) in ids]], rtol=1e-5, atol=1e-5)


def test_scores_are_what_their_formulas_say(model, tokenizer):
    prompts, answers = ["The bird", "A stone"], [" keeps the window, 3", " finds", " the the"]
    plain = torch.stack([log_likelihood(model, tokenizer, answers, p).total for p in prompts])
    tokens = torch.tensor([len(tokenizer.encode(answer)) for answer in answers])
    prior = log_likelihood(model, tokenizer, answers, "The").total
    for normalize, expected in {
        "none": plain,
        "tokens": plain / tokens,
        "characters": plain / torch.tensor([20, 6, 8]),
        "prior": plain - prior,
    }.items():
        found = zero_shot(model, tokenizer, prompts, answers, normalize=normalize, prior="The")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    own = zero_shot(model, tokenizer, prompts, [answers, answers[::-1]])
    torch.testing.assert_close(own[1], plain[1].flip(0), rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_named(tokenizer):
    torch.manual_seed(0)
    size = tokenizer.vocab_size
    model = models.create("gpt2", "causal_lm", vocab_size=size, **SIZES["gpt2"])
    other = train_tokenizer("char", TEXTS, 300)
    bare = train_tokenizer("char", TEXTS, 300)
    bare.bos = bare.eos = None
    seq2seq = models.create("t5", "conditional_generation", vocab_size=size, d_model=16, d_kv=8,
                            num_heads=2, d_ff=32, num_layers=1)  # fmt: skip
    for call, message in (
        (lambda: log_likelihood(model, tokenizer, "text"), "texts must be several texts"),
        (lambda: log_likelihood(model, tokenizer, ["a", ""]), "texts must each have a token"),
        (lambda: log_likelihood(model, tokenizer, ["a"], ["b", "c"]), "prompts must be one or 1"),
        (lambda: log_likelihood(model, tokenizer, ["a"], length=161), "between 2 and 160, got 161"),
        (lambda: log_likelihood(model, tokenizer, ["a"], length=1), "between 2 and 160, got 1"),
        (lambda: log_likelihood(model, tokenizer, ["a"], batch_size=0), "batch_size must be at le"),
        (lambda: log_likelihood(model, bare, ["a"]), "prompts must each have a token"),
        (lambda: log_likelihood(model, bare, ["a"], ends=True), "ends=True needs"),
        (lambda: log_likelihood(seq2seq, tokenizer, ["a"]), "causal language model, got Cond"),
        (lambda: zero_shot(model, tokenizer, "a", ["b"]), "prompts must be a list of texts"),
        (lambda: zero_shot(model, tokenizer, [], ["b"]), "prompts must be a list of texts"),
        (lambda: zero_shot(model, tokenizer, ["a"], []), "answers must be texts"),
        (lambda: zero_shot(model, tokenizer, ["a"], "b"), "answers must be texts"),
        (lambda: zero_shot(model, tokenizer, ["a", "b"], [["c"], ["d", "e"]]), "answers must be"),
        (lambda: zero_shot(model, tokenizer, ["a"], ["b"], normalize="x"), "normalize must be one"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    model.config.source["tokenizer_fingerprint"] = tokenizer.fingerprint
    with pytest.raises(TokenizerMismatch):
        log_likelihood(model, other, ["a"])


def test_the_example_of_the_docs_runs(tokenizer, tmp_path, monkeypatch, capsys):
    docs = (Path(__file__).parents[2] / "docs/training.md").read_text()
    (example,) = (
        c for c in re.findall(r"```python\n(.*?)```", docs, re.DOTALL) if "zero_shot" in c
    )
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": tokenizer.vocab_size, **SIZES["gpt2"]}
    models.create("gpt2", "causal_lm", **sizes).save_pretrained("runs/verses/model")
    tokenizer.save("runs/verses/model")
    exec(example, {})
    assert "nats a character" in capsys.readouterr().out
