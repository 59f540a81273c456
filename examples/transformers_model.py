"""A transformers model reads a prompt with Stem; every layer tells what it kept.

The model is small and random, so that this runs anywhere in seconds. With weights of your own it is
`AutoModelForCausalLM.from_pretrained(name, attn_implementation="stem")`.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stem_attention.integrations.transformers import set_policy, use_policy  # importing it registers "stem"

torch.manual_seed(0)
sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_hidden_layers=4, max_position_embeddings=8192, **sizes)).eval()
prompt = torch.randint(1000, (1, 6000))

model.set_attn_implementation("stem")
set_policy(model, "mass:share=8", dense_layers=1)

calls = []
with torch.inference_mode(), use_policy(observer=calls.append):
    answer = model.generate(prompt, max_new_tokens=3, do_sample=False)

for call in calls[: model.config.num_hidden_layers]:
    how = f"kept {call.density:.1%} of the blocks" if call.sparse else f"dense ({call.reason})"
    print(f"layer {call.layer}: {call.q_len} queries, {how}")
later = calls[model.config.num_hidden_layers :]
print(f"then {', '.join({call.reason for call in later})} for {answer.shape[1] - prompt.shape[1]} tokens")
