"""What the model families differ in beyond their shapes: each one's building plan, without numbers.

Sources: transformers' modeling files of Qwen2, Llama and Gemma2.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    architecture: str  # as config.json names it
    qkv_bias: bool  # queries, keys and values have a bias
    activation: str  # of the gate: "silu" | "gelu_tanh"
    zero_centered_norms: bool  # a norm multiplies by 1 + weight
    post_norms: bool  # attention and MLP end in a norm, before they are added to the residual stream
    scaled_embedding: bool  # the embedding's output is multiplied by sqrt(hidden_size)
    alternating_window: bool  # layers 0, 2, 4, .. see the last `sliding_window` tokens only


# What config.json says of Llama-3.1's rope scaling.
ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")

FAMILIES = {
    "qwen2": Family("Qwen2ForCausalLM", True, "silu", False, False, False, False),
    "llama3": Family("LlamaForCausalLM", False, "silu", False, False, False, False),
    "gemma2": Family("Gemma2ForCausalLM", False, "gelu_tanh", True, True, True, True),
}
