"""Texts, words and passages with labels, as the heads of fasttx.models take them."""

import pytest
import tokenizers
import torch

from fasttx.models import create
from fasttx.training import (
    AnswerSpans,
    TextLabels,
    Tokenizer,
    WordLabels,
    fit,
    predict,
    train_tokenizer,
)

TEXT = "Ann met Bob in the old town of Ulm . He smiled and she did not ."


@pytest.fixture(scope="module")
def tokenizer():
    """wordpiece, with BERT's template for a text and for two."""
    special = {"cls": "[CLS]", "sep": "[SEP]"}
    found = train_tokenizer("wordpiece", [TEXT], 60, lowercase=True, min_frequency=9,
                            special=special)  # fmt: skip
    found.backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", found.cls), ("[SEP]", found.sep)],
    )
    return found


def model(tokenizer, head, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 64, "max_position_embeddings": 64, "hidden_dropout_prob": 0.0,
             "attention_probs_dropout_prob": 0.0}  # fmt: skip
    return create("bert", head, vocab_size=tokenizer.vocab_size, **sizes, **options)


def test_texts_and_their_classes(tokenizer):
    examples = TextLabels(tokenizer, ["Ann", "in Ulm", "[SEP]"], [2, 0, 1])
    batch = examples.batch([1, 0])
    ids = [tokenizer.prompt(text) for text in ("in Ulm", "Ann")]
    assert ids[0][0] == tokenizer.cls and ids[0][-1] == tokenizer.sep
    short = [*ids[1], *[tokenizer.pad] * (len(ids[0]) - len(ids[1]))]
    assert batch["input_ids"].tolist() == [ids[0], short]
    assert batch["attention_mask"].sum(1).tolist() == [len(ids[0]), len(ids[1])]
    assert batch["labels"].tolist() == [0, 2]
    assert "token_type_ids" not in batch
    assert examples.rows[2].tolist().count(tokenizer.sep) == 1  # in a text it is five characters
    assert "labels" not in TextLabels(tokenizer, ["Ann"]).batch([0])
    assert TextLabels(tokenizer, ["Ann"], [0.5]).batch([0])["labels"].dtype == torch.float64


def test_a_word_is_labelled_at_its_first_token(tokenizer):
    words = TEXT.split()
    examples = WordLabels(tokenizer, [words, ["Ulm"]], [list(range(len(words))), [7]])
    batch = examples.batch([0, 1])
    assert batch["labels"].shape == batch["input_ids"].shape
    labels, encoding = batch["labels"][0].tolist(), examples.encodings[0]
    assert labels[0] == labels[-1] == -100
    seen = [label for label in labels if label != -100]
    assert seen == list(range(len(words)))
    for word, place in zip(words, examples.places[0], strict=True):
        first, _ = encoding.offsets[place]
        assert TEXT[first:].startswith(word) and place > 0
    assert len(seen) < encoding.attention_mask.count(1) - 2  # some words have more tokens
    assert batch["labels"][1].tolist()[examples.places[1][0]] == 7


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "wordpiece"])
def test_words_are_found_in_every_kind_of_tokenizer(kind):
    size = 300 if kind == "bpe" else 40
    tokenizer = train_tokenizer(kind, [TEXT], size, min_frequency=1, template="bos_eos")
    words = TEXT.split()
    examples = WordLabels(tokenizer, [words], [range(len(words))])
    places = examples.places[0]
    assert places[0] >= 1 and (places[1:] > places[:-1]).all()
    offsets = [examples.encodings[0].offsets[p] for p in places]
    for word, (first, end) in zip(words, offsets, strict=True):
        assert word.startswith(TEXT[first:end].strip()), (word, TEXT[first:end])


def test_words_that_are_cut_off_have_no_place(tokenizer):
    examples = WordLabels(tokenizer, [TEXT.split()], [[0] * len(TEXT.split())], 8, cut=True)
    assert len(examples.rows[0]) == 8 and examples.places[0][-1] == -1
    assert examples.places[0].max() < 7


def test_answers_are_spans_of_their_passages(tokenizer):
    first = TEXT.index("old")
    span = (first, first + len("old town"))
    examples = AnswerSpans(tokenizer, ["where ?", "who ?"], [TEXT, TEXT], [span, (0, 3)])
    batch = examples.batch([0, 1])
    start, end = batch["labels"][0].tolist()
    encoding = examples.encodings[0]
    assert TEXT[encoding.offsets[start][0] : encoding.offsets[end][1]] == "old town"
    types = batch["token_type_ids"][0]
    assert types[0] == 0 and types[start] == types[end] == 1
    for i, right in enumerate(["old town", "Ann"]):
        logits = torch.zeros(len(examples.rows[i]), 2)
        logits[batch["labels"][i, 0], 0] = logits[batch["labels"][i, 1], 1] = 3
        logits[0] = 9  # the question is no answer
        assert TEXT[slice(*examples.answer(i, logits))] == right
    logits = torch.zeros(len(examples.rows[0]), 2)
    logits[end, 0] = logits[start, 1] = 5  # the wrong way round
    first, last = examples.answer(0, logits)
    assert first < last
    logits = torch.zeros(len(examples.rows[0]), 2)
    first, last = len(encoding.tokens) - 2, encoding.char_to_token(0, 1)
    logits[last, 0] = logits[first, 1] = 5
    assert len(TEXT[slice(*examples.answer(0, logits, longest=2))].split()) <= 2


def test_predictions_have_no_padding_and_the_order_of_the_texts(tokenizer):
    texts = ["Ann met Bob", "he", TEXT, "she did not smile"]
    words = WordLabels(tokenizer, [text.split() for text in texts])
    tagger = model(tokenizer, "token_classification", num_labels=3).train()
    found = predict(tagger, words, batch_size=3)
    assert tagger.training and [len(x) for x in found] == [len(row) for row in words.rows]
    tagger.eval()
    for i, logits in enumerate(found):
        with torch.no_grad():
            torch.testing.assert_close(logits, tagger(**words.batch([i])).logits[0])
    whole = model(tokenizer, "sequence_classification", num_labels=3)
    assert [x.shape for x in predict(whole, TextLabels(tokenizer, texts))] == [(3,)] * 4


def test_each_head_learns_its_examples(tokenizer, tmp_path):
    """A class by a word, a word by itself, and the name beside the verb of a question."""
    options = {"steps": 60, "batch_size": 8, "learning_rate": 1e-2}
    texts, sides = ["Ann smiled", "Bob smiled", "she met Ann", "he met Bob"] * 2, [0, 1] * 4
    texts = TextLabels(tokenizer, texts, sides)
    first = model(tokenizer, "sequence_classification", num_labels=2)
    fit(first, texts, tmp_path / "texts", **options)
    assert [int(x.argmax()) for x in predict(first, texts)] == sides

    sentences = [TEXT.split(), ["Ulm", "met", "Ann"]] * 4
    known = [[int(w[0].isupper()) for w in words] for words in sentences]
    words = WordLabels(tokenizer, sentences, known)
    second = model(tokenizer, "token_classification", num_labels=2)
    fit(second, words, tmp_path / "words", **options)
    guesses = [x.argmax(-1)[torch.as_tensor(p)].tolist()
               for x, p in zip(predict(second, words), words.places, strict=True)]  # fmt: skip
    assert guesses == known

    passages = ["Ann met Bob", "Bob met Ann", "old Ulm met Ann", "he met old Bob"] * 2
    spans = [(p.index(" ", p.index("met")) + 1, len(p)) for p in passages]
    answers = AnswerSpans(tokenizer, ["met ?"] * 8, passages, spans)
    third = model(tokenizer, "question_answering")
    fit(third, answers, tmp_path / "answers", **options)
    found = [answers.answer(i, logits) for i, logits in enumerate(predict(third, answers))]
    assert found == spans


def test_a_folder_of_bert_keeps_its_template(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    rows = [AnswerSpans(t, ["who ?"], [TEXT]).rows[0].tolist() for t in (tokenizer, loaded)]
    assert rows[0] == rows[1] and rows[0].count(tokenizer.sep) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: TextLabels(t, []), "texts: there are none"),
        (lambda t: TextLabels(t, ["Ann", " "]), "texts: number 1 is empty: ' '"),
        (lambda t: TextLabels(t, ["Ann"], [0, 1]), "labels must be as many as texts, 1, got 2"),
        (lambda t: TextLabels(t, ["Ann " * 9], length=5), "number 0 has more than 5 tokens"),
        (lambda t: TextLabels(t, ["Ann"], length=2), "length must be at least 3, got 2"),
        (lambda t: WordLabels(t, [["Ann"], []]), "sentences: number 1 is empty: ''"),
        (lambda t: WordLabels(t, [["old town"]]), "number 0 has words that are empty or hold"),
        (lambda t: WordLabels(t, [["Ann"]], [[1, 2]]), "labels of sentence 0 must be 1, one a"),
        (lambda t: AnswerSpans(t, ["who ?"], []), "passages must be as many as questions, 1"),
        (lambda t: AnswerSpans(t, ["who ?"], [TEXT], [(3, 3)]), r"\(3, 3\) of question 0"),
        (lambda t: AnswerSpans(t, ["who ?"], [TEXT], [(51, 54)], 20, cut=True),
         "of question 0 holds no token of its passage, or one past 20 tokens: 'she'"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        make(tokenizer)
