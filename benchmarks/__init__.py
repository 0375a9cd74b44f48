"""Honest benchmarks: every provider beside fasttx, interleaved, gated by its error against fp64.

``fasttx bench --help`` lists what can be measured; ``docs/benchmarks.md`` says how, and what each
column means.
"""
