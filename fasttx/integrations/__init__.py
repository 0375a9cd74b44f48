"""fasttx inside other libraries. Importing this imports none of them."""

from . import _on_import

# What every transformers model is built on; fasttx registers its attention right after it.
_on_import.after("transformers.modeling_utils", "fasttx.integrations.hf_attention")
