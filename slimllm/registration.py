"""Makes the native pruned format known to transformers' Auto classes, so that no remote code is needed with slimllm."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from slimllm.modeling_slim_llama import SlimLlamaConfig, SlimLlamaForCausalLM, SlimLlamaModel

AutoConfig.register("slim_llama", SlimLlamaConfig, exist_ok=True)
AutoModel.register(SlimLlamaConfig, SlimLlamaModel, exist_ok=True)
AutoModelForCausalLM.register(SlimLlamaConfig, SlimLlamaForCausalLM, exist_ok=True)
# save_pretrained then writes the modeling file beside the weights.
SlimLlamaConfig.register_for_auto_class()
SlimLlamaModel.register_for_auto_class("AutoModel")
SlimLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
