"""The Triton kernel of attention_map, compiled for GPUs that are not there."""

import pytest

from .ahead import compiled


@pytest.mark.slow
def test_compiles_for_every_target():
    """No spills, shared memory within the limit."""
    assert compiled("attention_map", {"attention_map_kernel", "expand_table_kernel"})
