"""The page in a real browser: it opens without errors and without a network, layer and head can be
chosen, hovering a word shows its links."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from fasttx.inspect import html, look
from tests.inspect.small import TEXT, long, ours, tokenizer

pytest.importorskip("transformers", reason="transformers is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no headless browser is installed ({', '.join(BROWSERS)})"
)

ERRORS = """<script>const errors = [];
addEventListener("error", e => errors.push(e.message));
const told = console.error; console.error = (...a) => { errors.push(a.join(" ")); told(...a); };
</script>"""
ACTIONS = """<script>
const seen = {}, get = id => document.getElementById(id);
const pick = (id, value) => { get(id).value = value; get(id).dispatchEvent(new Event("change")); };
const hover = i => get("queries").children[i].dispatchEvent(
  new MouseEvent("mouseover", {bubbles: true}));
const links = () => [...get("links").children].map(
  b => [b.firstChild.textContent, b.lastChild.textContent]);
const picture = () => get("map").toDataURL();
ACT
seen.errors = errors;
seen.loaded = performance.getEntriesByType("resource").map(e => e.name);
const result = document.createElement("pre"); result.id = "result";
result.textContent = JSON.stringify(seen); document.body.append(result);
</script></body>"""


def run(page: str, actions: str, tmp_path) -> dict:
    path = tmp_path / "page.html"
    page = page.replace("<head>", "<head>" + ERRORS)
    path.write_text(page.replace("</body>", ACTIONS.replace("ACT", actions)), encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
         path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


def test_layer_and_head_can_be_chosen_and_words_show_their_links(tmp_path):
    found = look(ours("gpt2", tmp_path), tokenizer(), TEXT)
    seen = run(html(found), """
seen.before = picture(); seen.layer = get("layer").value; seen.head = get("head").value;
pick("head", "1"); seen.otherHead = picture(); hover(5); seen.five = links();
seen.chosen = get("queries").querySelector(".chosen").dataset.i; seen.tip = get("tip").textContent;
seen.shaded = get("queries").querySelectorAll("i").length;
hover(9); seen.nine = links();
get("special").checked = true; get("special").dispatchEvent(new Event("change"));
seen.strong = [...get("strong").children].map(b => b.title);
pick("layer", "0"); seen.otherLayer = picture(); seen.module = get("module").textContent;
get("heads").children[0].click(); seen.clicked = get("head").value;
pick("layer", "rollout"); seen.rollout = links();
get("temperature").value = 0; get("temperature").dispatchEvent(new Event("input"));
seen.cold = get("bars").children[0].lastChild.textContent;
pick("word", get("word").options[2].value); seen.near = get("near").children.length;
seen.tokens = get("tokens").rows.length;
""", tmp_path)  # fmt: skip
    assert seen["errors"] == [] and seen["loaded"] == []
    assert (seen["layer"], seen["head"]) == ("1", "0")
    assert len({seen["before"], seen["otherHead"], seen["otherLayer"]}) == 3
    p, words = found.maps[1].full[1, 5], TEXT.split()
    best = p.argsort(descending=True)[:3].tolist()
    for (name, share), j in zip(seen["five"], best, strict=False):
        assert name == f"{words[j]}  {j}"
        assert float(share.removesuffix(" %")) / 100 == pytest.approx(float(p[j]), abs=0.006)
    assert seen["chosen"] == "5" and seen["shaded"] == 6
    assert seen["tip"].startswith(f"{words[5]} → {words[best[0]]}")
    assert seen["nine"] != seen["five"]
    links = found.maps[1].full[1].clone().fill_diagonal_(0)
    first = divmod(int(links.argmax()), links.shape[1])
    assert seen["strong"][0] == f"{first[0]} → {first[1]}" and len(seen["strong"]) == 12
    assert seen["module"] == "transformer.stack.layers.0.attention" and seen["clicked"] == "0"
    assert len(seen["rollout"]) == 10
    cold = found.distributions[-1].probabilities(0.1)[0]
    assert float(seen["cold"].removesuffix(" %")) == pytest.approx(100 * cold, abs=0.06)
    assert seen["near"] == 8 and seen["tokens"] == len(found.tokens) + 1


def test_cross_attention_and_long_texts(tmp_path):
    found = look(ours("t5", tmp_path), tokenizer(), long(600), rows=[3, 40], target=TEXT)
    seen = run(html(found), """
seen.kind = get("kind").value; seen.first = links().length;
pick("kind", "encoder");
const box = get("queries"), lines = new Set([...box.children].map(w => w.offsetTop));
seen.lines = lines.size; seen.fits = box.scrollWidth <= box.clientWidth;
seen.rows = [...get("row").options].map(o => o.value);
seen.marked = [...box.querySelectorAll(".kept")].map(w => w.dataset.i);
pick("row", "3"); seen.chosen = box.querySelector(".chosen").dataset.i;
pick("head", "1"); hover(3); seen.three = links(); hover(40);
seen.kept = links().length;
hover(41); seen.missing = get("tip").textContent; seen.none = links().length;
pick("layer", "rollout"); pick("layer", "0");
pick("kind", "decoder"); hover(3); seen.decoder = links().length;
seen.head = get("head").value;
""", tmp_path)  # fmt: skip
    assert seen["errors"] == [] and seen["loaded"] == []
    assert seen["kind"] == "cross" and seen["kept"] == 10
    assert seen["lines"] > 5 and seen["fits"]
    assert seen["rows"] == seen["marked"] == ["3", "40"] and seen["chosen"] == "3"
    assert seen["missing"] == "Position 41 is not among the rows that were kept: 3, 40."
    p = found.layers("encoder")[1].probabilities(3)[1]
    # Neighbours in rank may be one step of the page's 8 bits apart.
    for (name, share), value in zip(seen["three"], p.sort(descending=True).values, strict=False):
        shown, j = float(share.removesuffix(" %")) / 100, int(name.split()[-1])
        assert shown == pytest.approx(float(p[j]), abs=0.004)
        assert shown == pytest.approx(float(value), abs=0.004)
    p = found.layers("decoder")[0].full[int(seen["head"]), 3]
    visible = int(((p.sqrt() * 255).round() > 0).sum())
    assert seen["none"] == 0 and seen["decoder"] == visible


def test_special_tokens_are_left_out_of_the_strongest_links(tmp_path):
    found = look(ours("bert", tmp_path), tokenizer(), "<s> the book <mask> the student </s>")
    seen = run(html(found), """
const strong = () => [...get("strong").children].map(b => b.title);
seen.words = strong();
get("special").checked = true; get("special").dispatchEvent(new Event("change"));
seen.all = strong();
seen.masked = get("nexttitle").textContent; seen.bars = get("bars").children.length;
""", tmp_path)  # fmt: skip
    assert seen["errors"] == []
    places = {int(i) for link in seen["words"] for i in link.split(" → ")}
    assert places == {1, 2, 4, 5} and len(seen["words"]) == 12
    assert seen["all"] != seen["words"]
    assert seen["masked"] == "The masked word" and seen["bars"] > 5


def test_a_text_without_a_mask(tmp_path):
    found = look(ours("bert", tmp_path), tokenizer(), TEXT)
    seen = run(html(found), """
seen.words = get("bars").textContent; seen.slider = get("temperature").offsetHeight;
seen.row = get("row").offsetHeight; seen.next = get("next").offsetHeight;
""", tmp_path)  # fmt: skip
    assert seen["errors"] == [] and "no mask in the text" in seen["words"]
    assert seen["slider"] == seen["row"] == 0 and seen["next"] > 0
