"""Writes README.md's table of ops from the data that picks kernels: tools/support_table.py"""

from pathlib import Path

from fasttx.explain import support_table

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- ops table -->", "<!-- end ops table -->"


def written() -> str:
    before, _, rest = README.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{support_table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    README.write_text(written())
