"""Tokenizers: trained, kept in a folder that transformers reads, known again by the model."""

import json
import types

import pytest
import transformers

from fasttx.training import Tokenizer, TokenizerMismatch, check_tokenizer, train_tokenizer
from fasttx.training.tokenizer import KINDS, remember_tokenizer

from . import corpus

TEXT = "The river keeps the lantern, 7 times."


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_tokenizer_survives_its_folder(kind, tmp_path):
    tokenizer = corpus.tokenizer(kind, template="bos_eos")
    assert tokenizer.decode(tokenizer.encode(TEXT)).replace(" ", "") == TEXT.replace(" ", "")
    tokenizer.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
    }  # fmt: skip
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.special == tokenizer.special and again.sentinels == tokenizer.sentinels
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.vocab_size == tokenizer.vocab_size == len(again.backend.get_vocab())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_folder_and_writes_one_that_is_read(kind, tmp_path):
    tokenizer = corpus.tokenizer(kind, template="bos_eos")
    tokenizer.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids = [tokenizer.bos, *tokenizer.encode(TEXT), tokenizer.eos]
    assert theirs(TEXT).input_ids == ids
    assert theirs.pad_token_id == tokenizer.pad and theirs.mask_token_id == tokenizer.mask
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    theirs.save_pretrained(tmp_path / "theirs")
    again = Tokenizer.load(tmp_path / "theirs")
    assert again.fingerprint == tokenizer.fingerprint and again.special == tokenizer.special


@pytest.mark.parametrize("kind", KINDS)
def test_what_looks_like_a_special_token_is_text(kind):
    tokenizer = corpus.tokenizer(kind)
    ids = tokenizer.encode("a <mask> and </s> and <extra_id_0>")
    assert not (tokenizer.special_ids - {tokenizer.unk}) & set(ids)
    assert tokenizer.mask in tokenizer.encode("a <mask> and", special=True)


def test_special_tokens_lowercase_and_kinds():
    named = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    tokenizer = train_tokenizer("wordpiece", corpus.documents(50), 300, lowercase=True,
                                special=named)  # fmt: skip
    tokens = tokenizer.backend.encode("RIVER").tokens
    assert "".join(tokens).replace("##", "") == "river"
    assert tokenizer.mask == tokenizer.backend.token_to_id("[MASK]")
    assert tokenizer.cls == tokenizer.backend.token_to_id("[CLS]") != tokenizer.bos


def test_folders_of_others(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\nriver\n##s\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "vocab_size": 8}))
    tokenizer = Tokenizer.load(tmp_path)  # no tokenizer.json: transformers makes it
    assert tokenizer.encode("the rivers") == [5, 6, 7]
    assert (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask) == (0, 2, 3, 4)
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    saved = Tokenizer.load(tmp_path / "saved")
    assert saved.encode("the rivers") == [5, 6, 7] and saved.bos == 2 and saved.eos == 3


def test_a_folder_that_holds_no_tokenizer_says_so(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    corpus.tokenizer().save(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a mapping"):
        Tokenizer.load(tmp_path)


def test_a_model_knows_its_tokenizer():
    first, other = corpus.tokenizer("word"), corpus.tokenizer("bpe")
    model = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=500))
    check_tokenizer(model, other)  # it remembers none, and the vocabulary is large enough
    remember_tokenizer(model, first)
    check_tokenizer(model, first)
    with pytest.raises(TokenizerMismatch, match="was trained with the tokenizer sha256"):
        check_tokenizer(model, other)
    small = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=10))
    with pytest.raises(TokenizerMismatch, match="vocabulary 10"):
        check_tokenizer(small, other)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "morse"}, "kind must be one of bpe, wordpiece, unigram, word, char"),
        ({"vocab_size": 100}, "vocab_size must be at least 261 for bpe"),
        ({"min_frequency": 0}, "min_frequency must be at least 1"),
        ({"sentinels": -1}, "sentinels must be at least 0"),
        ({"template": "x"}, "template must be one of"),
        ({"special": {"start": "<a>"}}, "unknown start"),
        ({"documents": "one text"}, "several texts"),
        ({"documents": []}, "hold no text"),
        ({"documents": ["", " "]}, "hold no text"),
    ],
)
def test_wrong_arguments(changed, message):
    arguments = {"kind": "bpe", "documents": ["a b"], "vocab_size": 300} | changed
    with pytest.raises(ValueError, match=message):
        train_tokenizer(**arguments)
