"""LLaMA 1 to 3 and models of the same architecture, with any scaling of the rotary embedding."""

from slimllm.models.families.base import Family, GGUFNames, divides_hidden_size, register_family

LLAMA = register_family(
    Family(
        # The same mathematics with every bias: uniform results are written as seed_oss, and can be pruned again.
        also=("seed_oss",),
        takes_heads=divides_hidden_size,
        stock_holds=lambda biases: biases.qkv == biases.out and biases.gate == biases.down,
        fits_llama=lambda config: True,
        gguf=GGUFNames(
            architecture="llama",
            layer={
                "attn_norm": "input_layernorm",
                "attn_q": "self_attn.q_proj",
                "attn_k": "self_attn.k_proj",
                "attn_v": "self_attn.v_proj",
                "attn_output": "self_attn.o_proj",
                "ffn_norm": "post_attention_layernorm",
                "ffn_gate": "mlp.gate_proj",
                "ffn_up": "mlp.up_proj",
                "ffn_down": "mlp.down_proj",
            },
            model={"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
        ),
    )
)
