"""The encoder tasks on slices made for the tests, with a BERT of one small layer."""

import random

import pytest
import tokenizers
import torch

from fasttx.models import create
from fasttx.training import train_tokenizer

NAMES = ["Ann", "Bob", "Cora", "Dan", "Eve", "Finn"]
DEEDS = ["opened the old door", "left the quiet town", "saw a ship of stone", "lost his blue hat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT with initial values and its tokenizer, of the tests' own words."""
    words = [*NAMES, *DEEDS, "good nice bad sad who did meet told in spring ? . town it was not"]
    special = {"cls": "[CLS]", "sep": "[SEP]"}
    tokenizer = train_tokenizer("wordpiece", words, 120, lowercase=True, min_frequency=1,
                                special=special)  # fmt: skip
    tokenizer.backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", tokenizer.cls), ("[SEP]", tokenizer.sep)],
    )
    torch.manual_seed(0)
    model = create("bert", "base", vocab_size=tokenizer.vocab_size, hidden_size=32,
                   num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                   max_position_embeddings=256)  # fmt: skip
    path = tmp_path_factory.mktemp("bert")
    model.save_pretrained(path)
    tokenizer.save(path)
    return path


def corpus(texts: int = 20) -> dict:
    """Texts as brown.read gives them: a name and what it did, five sentences a text."""
    rng, found = random.Random(0), {}
    tags = dict.fromkeys(("the", "a", "his"), "at") | {"of": "in"}
    for i in range(texts):
        sentences = []
        for name in rng.sample(NAMES, 5):
            verb, *rest = rng.choice(DEEDS).split()
            others = [(word, tags.get(word, "nn")) for word in rest]
            sentences.append([(name, "np"), (verb, "vbd"), *others, (".", ".")])
        found[f"c{i}"] = [sentences]
    return found


def test_sentiment_learns_a_slice(example, folder, tmp_path, capsys):
    sentiment = example("sentiment")
    rng = random.Random(0)
    words = (["bad", "sad"], ["good", "nice"])
    pairs = [(f"it was {rng.choice(words[i % 2])} in {rng.choice(NAMES)} town", i % 2)
             for i in range(72)]  # fmt: skip
    found = sentiment.main(
        ["--output", str(tmp_path), "--model", str(folder), "--held-out", "24", "--batch-size", "8",
         "--layers", "1", "--epochs", "20", "--learning-rate", "1e-2"], pairs)  # fmt: skip
    assert found["naive Bayes"] == 1 and found["tuned"] > 0.9
    assert 0 <= found["frozen"] <= 1
    assert "of 24 held-out tweets" in capsys.readouterr().out


def test_only_the_upper_layers_are_trained(example, folder):
    minilm = example("minilm")
    model = minilm.load(folder, "sequence_classification", trained=0, num_labels=2)
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"head"}
    model = minilm.load(folder, "question_answering", trained=9)
    layers = model.transformer.stack.layers
    assert all(p.requires_grad for p in layers.parameters())
    assert not any(p.requires_grad for p in model.transformer.embedding.parameters())


def test_proper_nouns_learns_a_slice(example, folder, tmp_path, capsys):
    proper_nouns = example("proper_nouns")
    found = proper_nouns.main(
        ["--output", str(tmp_path), "--model", str(folder), "--layers", "1", "--sentences", "80",
         "--held-out", "10", "--batch-size", "4", "--learning-rate", "5e-3"], corpus())  # fmt: skip
    assert found["f1"] > 0.9 and found["words"] == 1
    assert found["capitals"] == 0  # every name is the first of its sentence
    assert "proper nouns of 10 held-out sentences" in capsys.readouterr().out


def test_f1_counts_words(example):
    scores = example("proper_nouns").scores([[True, True, False], [False]], [[1, 0, 1], [1]])
    assert scores == {"precision": 1 / 2, "recall": 1 / 3, "f1": pytest.approx(0.4)}


def test_brown_is_read_as_it_is_written(example):
    brown = example("brown")
    text = "\n\n\tThe/at Fulton/np-tl jury/nn said/vbd 1/2/cd ./.\n\tIt/pps is/bez ./.\n\n\n"
    text += "\tAl's/np$\n"
    first, second = brown.read(text)
    assert first[0][1] == ("Fulton", "np-tl") and first[0][4] == ("1/2", "cd")
    assert [len(s) for s in first] == [6, 3] and second == [[("Al's", "np$")]]
    assert all(map(brown.is_name, ("np", "nps-tl", "np$", "fw-np", "np+bez", "fw-at+np-tl")))
    assert not any(map(brown.is_name, ("nn", "nn-tl", "pn", "pps+bez")))
    train, held = brown.parted({str(i): i for i in range(20)})
    assert held == [9, 19] and len(train) == 18


def test_questions_are_asked_of_clauses(example):
    answers = example("answers")
    told = [("Ann", "np"), ("told", "vbd"), ("Bob", "np"), (",", ","), ("``", "``"), ("Cora", "np"),
            ("Dee", "np"), ("left", "vbd"), ("the", "at"), ("town", "nn"), ("in", "in"),
            ("spring", "nn"), ("''", "''"), (".", ".")]  # fmt: skip
    assert list(answers.asked(told)) == [("who left the town in spring ?", (5, 7))]
    (question,) = answers.questions([[[told]]], least=3)
    assert answers.questions([[[told]]], least=4) == []
    first, end = question.span
    assert question.passage[first:end] == "Cora Dee" and question.passage.startswith("Ann told Bob")
    assert '" Cora Dee left the town in spring " .' in question.passage
    assert len(question.names) == 3
    after = [("Cora", "np"), ("Dee", "np"), ("smiled", "vbd"), (".", ".")]
    (question,) = answers.questions([[[told, after]]], apart=True)
    assert question.passage == "Cora Dee smiled ." and question.span == (0, 8)
    assert answers.questions([[[told]]], apart=True) == []
    assert answers.scores(["cora", "Cora Dee"], [question] * 2) == {
        "exact": 1 / 2,
        "f1": pytest.approx(5 / 6),
    }


def test_answers_learns_a_slice(example, folder, tmp_path, capsys):
    answers = example("answers")
    found = answers.main(
        ["--output", str(tmp_path), "--model", str(folder), "--layers", "1", "--epochs", "10",
         "--batch-size", "8", "--learning-rate", "5e-3"], corpus())  # fmt: skip
    # Of ten questions 0.1 to 0.3 in five runs, and a loss of 1.7 to 2.1; wordpiece's ties differ.
    assert found["model"]["exact"] >= found["random span"]["exact"] == 0
    assert found["loss"] < 2.6
    assert "most frequent name" in capsys.readouterr().out


def test_word_classes_learns_a_slice(example, folder, tmp_path, capsys):
    word_classes = example("word_classes")
    lines = [f"{w}\t{mean}\t0.5\t[1, 1]" for w, mean in (("Good", 2.0), ("sad", -1.5), (":)", 3))]
    assert word_classes.rated("\n".join(lines)) == [("good", 1), ("sad", 0)]
    rng = random.Random(0)
    pairs = sorted({("".join(rng.sample("abcdefgh", 5)), i % 2) for i in range(80)})
    pairs = [(word + ("nice" if side else "hat"), side) for word, side in pairs]
    train, test = word_classes.parted(pairs)
    assert not {w[:4] for w, _ in train} & {w[:4] for w, _ in test} and len(test) >= 5
    found = word_classes.main(
        ["--output", str(tmp_path), "--model", str(folder), "--layers", "1", "--epochs", "6",
         "--batch-size", "8", "--learning-rate", "5e-3"], pairs)  # fmt: skip
    assert found["letters"] > 0.9 and found["accuracy"] > 0.6
    assert "held-out words right" in capsys.readouterr().out


def test_letters_are_shared_at_either_end(example):
    word_classes = example("word_classes")
    assert word_classes.shared("sadness", "sadly") == 3
    assert word_classes.shared("kindness", "sadness") == 5  # d, n, e, s, s
    assert word_classes.by_letters([("sadly", 0), ("gladly", 1)], [("sadness", 0)]) == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [("sentiment", "tweets"), ("word_classes", "lexicon"), ("answers", "documents"),
     ("proper_nouns", "documents")],
)  # fmt: skip
def test_a_text_that_cannot_be_had_is_said(example, name, text, tmp_path, monkeypatch):
    module = example(name)

    def fail():
        raise module.Unavailable("no network")

    monkeypatch.setattr(module, text, fail)
    with pytest.raises(SystemExit, match="cannot be had: no network"):
        module.main(["--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "function", "holds"),
    [
        ("sentiment", "tweets", lambda rows: len(rows) == 2 * sum(c for _, c in rows) > 12_000),
        ("word_classes", "lexicon", lambda text: text.count("\n") > 7000 and "\nabandon\t" in text),
        ("brown", "documents", lambda texts: len(texts) == 500
         and sum(len(p) for text in texts.values() for p in text) == 57_340),
    ],
)  # fmt: skip
def test_the_real_text_is_what_the_examples_say(example, name, function, holds):
    module = example(name)
    try:
        found = getattr(module, function)()
    except module.Unavailable as why:
        pytest.skip(f"the text cannot be had: {why}")
    assert holds(found)


@pytest.mark.slow
def test_minilm_tells_names_from_words_after_a_few_sentences(example, tmp_path):
    """The real model and the real corpus, on a slice."""
    proper_nouns = example("proper_nouns")
    try:
        texts = proper_nouns.documents()
        example("minilm").folder()
    except proper_nouns.Unavailable as why:
        pytest.skip(f"the corpus or the model cannot be had: {why}")
    found = proper_nouns.main(
        ["--output", str(tmp_path), "--layers", "1", "--sentences", "800", "--held-out", "200",
         "--batch-size", "16", "--learning-rate", "1e-3"], texts)  # fmt: skip
    assert found["f1"] > 0.6
