"""Sizes of published models, from which models of random weights are made without any download."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model of the LLaMA family."""

    name: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    num_layers: int
    head_dim: int = 128
    vocab_size: int = 32000
    tied: bool = False  # whether the output head is the embedding

    @property
    def units(self) -> int:
        """Number of units of attention: KV groups, or heads if there are no groups."""
        return self.num_kv_heads

    @property
    def attention_width(self) -> int:
        """Number of inputs of o_proj."""
        return self.num_heads * self.head_dim

    def config(self, num_layers: int | None = None) -> LlamaConfig:
        """Return the configuration of such a model, with `num_layers` layers, or all of them."""
        return LlamaConfig(
            hidden_size=self.hidden_size,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=num_layers or self.num_layers,
            vocab_size=self.vocab_size,
            tie_word_embeddings=self.tied,
            max_position_embeddings=4096,
            dtype="bfloat16",
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-7b", 4096, 32, 32, 11008, 32),
        Shape("llama-13b", 5120, 40, 40, 13824, 40),
        Shape("llama-33b", 6656, 52, 52, 17920, 60),
        Shape("llama-2-70b", 8192, 64, 8, 28672, 80),
        Shape("llama-3.1-405b", 16384, 128, 8, 53248, 126, vocab_size=128256),
        Shape("tinyllama-1.1b", 2048, 32, 4, 5632, 22, head_dim=64),
        Shape("smollm2-360m", 960, 15, 5, 2560, 32, head_dim=64, vocab_size=49152, tied=True),
        Shape("smollm2-135m", 576, 9, 3, 1536, 30, head_dim=64, vocab_size=49152, tied=True),
    )
}
