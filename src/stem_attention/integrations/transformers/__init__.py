"""Run models of Hugging Face transformers with Stem. Importing this makes ``attn_implementation="stem"`` known.

Prefill is sparse, also continued and chunked prefill over a cache and left-padded batches, whose rows are computed as if
they came alone, and packed sequences whose borders the model passes. Everything else goes to the host's own dense attention:
decode, short queries and prompts, the first ``dense_layers``, layers without causality, biases, packed
sequences without borders, masks with holes, dropout, and classes that support eager attention alone.

docs/transformers.md tells more, also of graphs of ``torch.compile``, which cannot read padding.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from stem_attention.integrations.transformers.attention import MIN_QUERY_LEN, attention_forward
from stem_attention.integrations.transformers.mask import stem_mask
from stem_attention.integrations.transformers.model import NAME, check_model, register, set_policy, watch_loading
from stem_attention.integrations.transformers.settings import LayerCall, use_policy

__all__ = ["MIN_QUERY_LEN", "LayerCall", "attention_forward", "check_model", "register", "set_policy", "use_policy"]

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, stem_mask)
watch_loading()
