"""A model that an example trained, as the tests keep it: weights in bfloat16, its tokenizer.

python tools/small_model.py runs/king_james/model tests/data/small/gpt2
"""

import argparse
import json
from pathlib import Path

import torch

import fasttx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    fasttx.from_pretrained(given.model, dtype=torch.bfloat16).save_pretrained(given.folder)
    for path in given.model.glob("*token*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (given.folder / path.name).write_text(text + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in given.folder.iterdir())
    print(f"{given.folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
