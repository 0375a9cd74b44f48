"""The page: one file that loads nothing, whose numbers are the maps'."""

import base64
import json
import re

import numpy as np
import pytest
import torch

from fasttx.inspect import GRID, html, look, write
from fasttx.inspect import page as pages
from tests.inspect.small import TEXT, long, ours, tokenizer

pytest.importorskip("transformers", reason="transformers is not installed")


def data(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def unpacked(text: str, *shape: int) -> torch.Tensor:
    values = np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)
    return torch.from_numpy(values.astype(np.float32) / 255) ** 2


def loads_nothing(page: str) -> bool:
    code = re.sub(r'id="data">.*?</script>', "", page, flags=re.DOTALL)
    return not re.search(r"https?:|//\w|\bsrc=|href=|@import|url\(|fetch\(|XMLHttp|import\(", code)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_numbers_are_the_maps(family, tmp_path):
    found = look(ours(family, tmp_path), tokenizer(), TEXT)
    page = html(found, layer=0, head=1)
    assert loads_nothing(page)
    pieces = data(page)
    assert pieces["first"] == {"kind": found.kinds[-1], "layer": 0, "head": 1}
    assert pieces["tokens"] == found.tokens
    assert [pieces["words"][str(i)] for i in found.tokens][-1] == "book"
    for kind in found.kinds:
        for maps, layer in zip(found.layers(kind), pieces["layers"][kind], strict=True):
            p = unpacked(layer["full"], *maps.full.shape)
            assert bool(((p - maps.full).abs() <= maps.full.sqrt() / 255 + 1e-5).all())
    assert (pieces["distributions"] == []) == (family == "bert")


def test_many_heads_give_the_strongest_links(tmp_path, monkeypatch):
    found = look(ours("gpt2", tmp_path), tokenizer(), TEXT)
    monkeypatch.setattr(pages, "_WHOLE", 900)
    layer = data(html(found))["layers"]["decoder"][1]
    maps = found.maps[1]
    k = layer["k"]
    assert 1 <= k <= 900 // (3 * 2 * 2 * 16)
    keys = np.frombuffer(base64.b64decode(layer["keys"]), "<u2").reshape(2, 16, k)
    assert torch.equal(torch.from_numpy(keys.astype(np.int64)), maps.full.topk(k, -1).indices)
    assert layer["grid"] == 16


def test_words_cannot_leave_their_place(tmp_path):
    found = look(ours("gpt2", tmp_path), tokenizer(), "the book </script><script>alert(1)")
    page = html(found)
    assert page.count("<script") == 2
    raw = page.partition('id="data">')[2].partition("</script>")[0]
    assert "<" not in raw and "<unk>" in data(page)["words"].values()
    assert "alert" in page and "<title>CausalLM: the book &lt;/script&gt;" in page


def test_the_longest_text_makes_a_small_page(tmp_path):
    model = ours("bloom", tmp_path, n_layer=1, n_head=1, hidden_size=8)
    found = look(model, tokenizer(), long(16384), rows=[0, 9000, -1])
    page = html(found)
    assert len(page.encode()) < pages.LARGEST
    layer = data(page)["layers"]["decoder"][0]
    assert unpacked(layer["pooled"], 1, GRID, GRID).sum() > 0
    exact = unpacked(layer["exact"], 1, 3, 16384)
    assert exact[0, 0].tolist() == [1.0] + [0.0] * 16383


def test_a_page_that_would_be_too_large_is_refused(tmp_path, monkeypatch):
    found = look(ours("gpt2", tmp_path), tokenizer(), TEXT)
    monkeypatch.setattr(pages, "LARGEST", 1000)
    with pytest.raises(ValueError, match="its page would have"):
        html(found)


def test_layers_and_heads_that_are_not_there(tmp_path):
    found = look(ours("gpt2", tmp_path), tokenizer(), TEXT)
    with pytest.raises(ValueError, match=r"layer must lie in \[0, 2\), got 2"):
        write(found, tmp_path / "out", layer=2)
    with pytest.raises(ValueError, match=r"head must lie in \[0, 2\), got 5"):
        write(found, tmp_path / "out", head=5)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "count"), [("bart", 16), ("bloom", 600)])
def test_pictures(family, count, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    found = look(ours(family, tmp_path), tokenizer(), long(count))
    paths = write(found, tmp_path / "out")
    names = {"attention", "heads", "rollout", "statistics", "embedding", "next"}
    names |= {"cross"} if family == "bart" else set()
    assert {p.stem for p in paths if p.suffix == ".png"} == names
    from matplotlib import image

    for path in paths[1:]:
        pixels = image.imread(path)
        assert pixels.shape[0] > 150 and pixels[..., :3].std() > 0.05, path
