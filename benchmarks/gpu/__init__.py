"""Everything that only a GPU can say, by one command, in parts that each fit in ten minutes.

    python -m benchmarks.gpu [--only build,test,sanitize,tune,bench] [--seconds N] [--out FOLDER]

build: the native library for this card. test: the GPU tests, and every op's own tests with their
inner ops on the card. sanitize: compute-sanitizer's four tools on the small calls. tune: the tile
tables. bench: attention and the other ops beside what else is installed, with the card's own
matrix rate and copy bandwidth. One record, gpu.json, grows item by item and is resumed; gpu.md is
its summary, with a line to reproduce each failure.
"""
