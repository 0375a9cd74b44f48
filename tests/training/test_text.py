"""Text in: what is read, and what is refused in words before any work."""

import pytest

from fasttx.training import TokenStream, read_documents, text

from . import corpus


def test_documents_are_lines_paragraphs_or_files(tmp_path):
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    one.write_bytes("\ufeffa b\r\nc\n\n \nd\u00e9".encode())
    two.write_text("e\n\n\nf\ng\n")
    for kind, expected in {
        "line": ["a b", "c", "d\u00e9", "e", "f", "g"],
        "paragraph": ["a b\nc", "d\u00e9", "e", "f\ng"],
        "file": ["a b\nc\n\n \nd\u00e9", "e\n\n\nf\ng"],
    }.items():
        assert list(read_documents([one, two], kind)) == expected


def test_bad_files_are_all_named_at_once(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"missing does not exist.*is not a file.*empty is empty"):
        read_documents([tmp_path / "missing", tmp_path, tmp_path / "empty"])
    with pytest.raises(ValueError, match="no files"):
        read_documents([])
    with pytest.raises(ValueError, match="documents must be one of line, paragraph, file"):
        read_documents(tmp_path / "empty", "word")


def test_bytes_that_are_not_utf8_are_located(tmp_path):
    path = tmp_path / "latin"
    path.write_bytes(b"fine\ncaf\xe9 au lait\n")
    with pytest.raises(ValueError, match=r"latin: line 2: byte 0xe9 at offset 8 is not UTF-8"):
        list(read_documents(path))


def test_huge_text_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_text("a" * 1000)
    monkeypatch.setattr(text, "available_memory", lambda: 999)
    with pytest.raises(ValueError, match="held in memory"):
        read_documents(path)
    monkeypatch.undo()
    monkeypatch.setattr(text, "LONGEST", 100)
    with pytest.raises(ValueError, match="line 1 is longer"):
        list(read_documents(path))
    path.write_text("a\n" * 200)
    with pytest.raises(ValueError, match="a paragraph of more than"):
        list(read_documents(path, "paragraph"))
    assert len(list(read_documents(path))) == 200


def test_text_without_tokens_is_refused():
    tokenizer = corpus.tokenizer("word")
    with pytest.raises(ValueError, match="the text is empty"):
        TokenStream.from_documents(tokenizer, [])
    with pytest.raises(ValueError, match="the text is empty"):
        TokenStream.from_documents(tokenizer, [" ", "\n"])


def test_stream_keeps_documents_and_words():
    tokenizer = corpus.tokenizer()
    texts = corpus.documents(30)
    stream = TokenStream.from_documents(tokenizer, [texts[0], "", *texts[1:]], words=True)
    assert stream.documents == 30
    for i, text_ in enumerate(texts):
        ids = stream.ids[stream.bounds[i] : stream.bounds[i + 1]]
        assert tokenizer.decode(ids) == text_
    # Words of byte-level BPE begin with a space or are punctuation.
    first = texts[0].split()[0]
    assert stream.words[0] and stream.words.sum() >= sum(len(t.split()) for t in texts)
    assert tokenizer.decode(stream.ids[: list(stream.words[1:]).index(True) + 1]) == first
    around = stream.joined((7,), (8, 9))
    assert around.ids[0] == 7 and list(around.ids[-2:]) == [8, 9]
    assert list(around.ids[around.bounds[1] - 2 : around.bounds[1] + 1]) == [8, 9, 7]
    assert len(around) == len(stream) + 90 and around.words.sum() == stream.words.sum() + 90


def test_stream_is_parted_by_document():
    stream = corpus.stream(corpus.tokenizer(), 50, words=True)
    rest, held = stream.parted(0.1, seed=3)
    assert (rest.documents, held.documents) == (45, 5)

    def texts(s):
        return [tuple(s.ids[a:b]) for a, b in zip(s.bounds[:-1], s.bounds[1:], strict=True)]

    assert sorted(texts(rest) + texts(held)) == sorted(texts(stream))
    assert rest.words.sum() + held.words.sum() == stream.words.sum()
    with pytest.raises(ValueError, match="cannot part"):
        stream.parted(1.5)
