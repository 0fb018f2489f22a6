"""Each family's decoder against transformers' own: token losses, and the gradient of their weighted sum.

transformers runs the examples one by one with eager attention; ours runs them packed or padded, under every kind
of layout. In fp64, with transformers kept from rounding norms, softmax and rotary angles to fp32, both add the same
numbers in another order. That is the truth for fp32 too: losses may be ten units of its roundoff, 2^-24, away from it,
gradients a hundred, as on paths of so many roundings; no processor has a say in that. Seen were 1.9 and 30, and of
transformers in fp32 1.9 and 22.

Shapes: N loss tokens of all examples, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers import modeling_rope_utils as rope_utils
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from megatron_scalebio.active_layers import Role
from megatron_scalebio.anatomy import padded_vocab_size
from megatron_scalebio.anatomy.tensors import shard
from megatron_scalebio.bilevel import Pass
from megatron_scalebio.data import Example, build_micro_batch
from megatron_scalebio.data.packing import plan_microbatches
from megatron_scalebio.device import CPU
from megatron_scalebio.losses import TokenCoefs
from megatron_scalebio.mcore.build import build_model
from megatron_scalebio.mcore.models import MegatronModels
from megatron_scalebio.mcore.parameters import NamedParameter
from megatron_scalebio.mcore.process_groups import start_process_groups
from tests.configs import resolved
from tests.distributed import run_distributed
from tests.mcore.runs import MAX_LENGTH, VOCAB_SIZE, Place, Shard, Shards, join, place_of, random_examples

LOSS_ROUNDINGS, GRADIENT_ROUNDINGS = 10, 100
MODELING = (modeling_gemma2, modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3, rope_utils)
WINDOW = 5
HIDDEN, FFN, HEADS, GROUPS = 32, 48, 4, 2
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=HIDDEN,
    intermediate_size=FFN,
    num_attention_heads=HEADS,
    num_key_value_heads=GROUPS,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
THEIRS: dict[str, PreTrainedConfig] = {
    "qwen2": Qwen2Config(
        **COMMON,
        num_hidden_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        use_sliding_window=False,
    ),
    "llama3": LlamaConfig(
        **COMMON, num_hidden_layers=2, rope_parameters={"rope_type": "llama3", "rope_theta": 100.0, **SCALING}
    ),
    "llama3 tied": LlamaConfig(
        **COMMON,
        num_hidden_layers=2,
        head_dim=12,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "qwen3": Qwen3Config(
        **COMMON,
        num_hidden_layers=2,
        head_dim=12,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "mistral": MistralConfig(
        **COMMON,
        num_hidden_layers=4,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "gemma2": Gemma2Config(
        **COMMON,
        num_hidden_layers=6,
        head_dim=12,
        pad_token_id=None,  # a padding token's embedding has no gradient, and these examples have every token
        query_pre_attn_scalar=10,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        sliding_window=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}
OURS = {
    "qwen2": ("model.family=qwen2", "model.shape.num_layers=2", "model.shape.rope_base=1e4"),
    "llama3": (
        *("model.family=llama3", "model.shape.num_layers=2", "model.shape.rope_base=100"),
        f"model.shape.rope_scaling={SCALING}",
    ),
    "llama3 tied": (
        *("model.family=llama3", "model.shape.num_layers=2", "model.shape.rope_base=1e4"),
        *("model.shape.head_size=12", "model.shape.tied_embeddings=true"),
    ),
    "qwen3": (
        *("model.family=qwen3", "model.shape.num_layers=2", "model.shape.rope_base=1e4", "model.shape.head_size=12"),
    ),
    "mistral": (
        *("model.family=mistral", "model.shape.num_layers=4", "model.shape.rope_base=1e4"),
        f"model.shape.sliding_window={WINDOW}",
    ),
    "gemma2": (
        *("model.family=gemma2", "model.shape.num_layers=6", "model.shape.rope_base=1e4"),
        *("model.shape.head_size=12", "model.shape.tied_embeddings=true", "model.shape.query_pre_attn_scalar=10"),
        *("model.shape.attention_softcap=1.5", "model.shape.final_softcap=2.0"),
        f"model.shape.sliding_window={WINDOW}",
    ),
}
RUN = (
    *(f"model.shape.hidden_size={HIDDEN}", f"model.shape.ffn_hidden_size={FFN}", "model.shape.norm_epsilon=1e-5"),
    *(f"model.shape.num_attention_heads={HEADS}", f"model.shape.num_query_groups={GROUPS}"),
    *(f"data.max_length={MAX_LENGTH}", "data.micro_batch_size=2", "bilevel.mode=fixed", "lisa.enabled=false"),
)
PADDED = "data.packing=false"
TP2, PP2, SP = "parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"
LAYOUTS = {
    "packed": ((), 1),
    "padded": ((PADDED,), 1),
    "TP2": ((TP2,), 2),
    "TP2 with sequence parallelism": ((TP2, SP), 2),
    "PP2": ((PP2,), 2),
    "TP2xPP2, padded": ((TP2, PP2, PADDED), 4),
    "TP2xPP2 with sequence parallelism": ((TP2, PP2, SP), 4),
}

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Found:
    losses: Tensor  # [N]
    gradients: Tensors  # Megatron-Core's global names -> full tensors


@cache
def examples() -> list[Example]:
    """Of 2 to 24 tokens; `source_id` is an example's number."""
    found = random_examples(5, tuple(range(12)))
    assert sum(len(example.tokens) > 2 * WINDOW for example in found) > 4
    return found


@cache
def loss_coefs() -> Tensor:
    """[N], in the order of the examples and their tokens."""
    count = sum(int(example.loss_mask.sum()) for example in examples())
    return torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@cache
def their_weights(name: str) -> Tensors:
    """Every parameter random, under transformers' names: a bias that is lost or a norm that is skipped shows."""
    generator, model = torch.Generator().manual_seed(2), AutoModelForCausalLM.from_config(THEIRS[name])
    weights = {}
    for key, parameter in model.named_parameters():
        deviation = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        center = 1.0 if key.endswith("norm.weight") and name != "gemma2" else 0.0
        weights[key] = center + deviation * torch.randn(parameter.shape, generator=generator)
    return weights


class _WideTorch:
    """torch, with fp64 where a source says fp32."""

    float = float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@contextmanager
def nothing_in_fp32() -> Iterator[None]:
    """transformers without its roundings to fp32."""
    with ExitStack() as patches:
        for module in MODELING:
            patches.enter_context(mock.patch.object(module, "torch", _WideTorch()))
        patches.enter_context(mock.patch.object(Tensor, "float", Tensor.double))
        patches.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        yield


@cache
def truth(name: str) -> Found:
    with nothing_in_fp32():
        return run_transformers(name, torch.float64)


def run_transformers(name: str, dtype: torch.dtype) -> Found:
    model = AutoModelForCausalLM.from_config(THEIRS[name], attn_implementation="eager", dtype=dtype)
    model.load_state_dict(their_weights(name), strict=False)  # a tied head is no parameter of its own
    losses = []
    for example in examples():
        tokens = torch.as_tensor(example.tokens).long()
        logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
        counts = torch.as_tensor(example.loss_mask)[1:]
        losses.append(cross_entropy(logits, tokens[1:], reduction="none")[counts])
    losses = torch.cat(losses)
    (losses * loss_coefs().to(dtype)).sum().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    return Found(losses.detach().double(), to_ours(gradients, padding=0.0))


NAMES = {
    "input_layernorm": "input_layernorm",
    "self_attn.o_proj": "self_attention.linear_proj",
    "mlp.down_proj": "mlp.linear_fc2",
}
NORMS = {"post_attention_layernorm": "pre_mlp_layernorm"}
HEAD_NORMS = {"self_attn.q_norm": "self_attention.q_layernorm", "self_attn.k_norm": "self_attention.k_layernorm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "self_attention.linear_proj.post_norm",
    "pre_feedforward_layernorm": "pre_mlp_layernorm",
    "post_feedforward_layernorm": "mlp.linear_fc2.post_norm",
}


def to_ours(theirs: Tensors, padding: float) -> Tensors:
    """transformers' tensors under Megatron-Core's names: per query group its queries, key and value; gate above up."""
    rows = padded_vocab_size(VOCAB_SIZE) - VOCAB_SIZE
    ours = {"decoder.final_layernorm.weight": theirs["model.norm.weight"]}
    tables = {"embedding.word_embeddings": "model.embed_tokens", "output_layer": "lm_head"}
    for name, key in tables.items():
        if f"{key}.weight" in theirs:
            ours[f"{name}.weight"] = pad(theirs[f"{key}.weight"], (0, 0, 0, rows), value=padding)
    gemma = "model.layers.0.pre_feedforward_layernorm.weight" in theirs
    layers = {int(key.split(".")[2]) for key in theirs if key.startswith("model.layers.")}
    for layer in layers:
        part = {key.removeprefix(f"model.layers.{layer}."): value for key, value in theirs.items()}
        ours_of = f"decoder.layers.{layer}."
        head_norms = HEAD_NORMS if "self_attn.q_norm.weight" in part else {}
        for key, name in {**NAMES, **(GEMMA_NORMS if gemma else NORMS), **head_norms}.items():
            ours[f"{ours_of}{name}.weight"] = part[f"{key}.weight"]
        ours[f"{ours_of}mlp.linear_fc1.weight"] = torch.cat([part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]])
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" in part:
                heads = [part[f"self_attn.{x}_proj.{kind}"].unflatten(0, (GROUPS, -1)) for x in "qkv"]
                ours[f"{ours_of}self_attention.linear_qkv.{kind}"] = torch.cat(heads, dim=1).flatten(0, 1)
    return ours


def run_rank(overrides: tuple[str, ...], weights: Tensors, fault: str | None) -> tuple[Place, Tensor, Shards]:
    """On every rank: (place, token losses [N] of the last stage, gradients)."""
    config = resolved(*RUN, *overrides, vocab_size=VOCAB_SIZE)
    groups = start_process_groups(config.parallel, CPU)
    place = groups.tensor_rank, groups.tensor.size()

    def initial(parameter: NamedParameter) -> Tensor:
        full = weights.get(parameter.name, weights["embedding.word_embeddings.weight"])
        return shard(parameter.declared, full, *place)

    models = MegatronModels(config, groups, CPU, initial)
    blocks = models.store.blocks[Role.UPPER].values()
    FAULTS.get(fault, lambda model: None)(models.chunk.models["upper"])
    models.redraw({Role.UPPER: list(range(config.model.shape.num_layers))})
    data, lengths = config.data, [example.num_positions for example in examples()]
    plan = plan_microbatches(lengths, MAX_LENGTH, data.packing, data.micro_batch_size, 0, 1)
    micro_batches, coefs = zip(*(number_tokens(rows, data.micro_batch_size) for rows in plan), strict=True)
    part = Pass(Role.UPPER, "train", list(micro_batches), list(coefs), len(loss_coefs()))
    (losses,) = models.forward_backward([part], fingerprint=0)
    active = models.active_sets[Role.UPPER].blocks
    return (
        place_of(groups),
        losses,
        {
            parameter.name: Shard(view, parameter.declared.cut.dim)
            for block in blocks
            for parameter, view in zip(block.parameters, block.views(active[block.name].gradient), strict=True)
        },
    )


def number_tokens(rows: list[list[int]], num_rows: int):
    """A micro-batch whose loss tokens are each a source of their own, so that losses per source are per token."""
    batch = build_micro_batch([[examples()[i] for i in row] for row in rows], MAX_LENGTH, num_rows, 0)
    counts = torch.tensor([int(example.loss_mask.sum()) for example in examples()])
    first = counts.cumsum(0) - counts
    ids = torch.cat([first[i] + torch.arange(counts[i]) for row in rows for i in row])
    assert torch.equal(batch.source_ids, torch.repeat_interleave(torch.arange(len(counts)), counts)[ids])
    object.__setattr__(batch, "source_ids", ids)
    return batch, TokenCoefs(torch.ones(len(ids), dtype=torch.float64), loss_coefs()[ids])


def last_layer_with_the_other_window(model) -> None:
    attention = model.decoder.layers[-1].self_attention.core_attention
    attention.window = WINDOW if attention.window is None else None


def without_embedding_scale(model) -> None:
    if model.pre_process:
        model.embedding._forward_hooks.clear()


def post_norms_not_zero_centered(model) -> None:
    model.decoder.layers[0].mlp.linear_fc2.post_norm.zero_centered = False


FAULTS = {
    "window": last_layer_with_the_other_window,
    "embedding": without_embedding_scale,
    "norm": post_norms_not_zero_centered,
}


@cache
def run_ours(name: str, layout: str, precision: str, changed: tuple[str, ...] = (), fault: str | None = None) -> Found:
    overrides, world_size = LAYOUTS[layout]
    overrides = (*OURS[name], f"precision.compute={precision}", *overrides, *changed)
    weights = to_ours(their_weights(name), padding=1.0)
    ranks = run_distributed(world_size, run_rank, overrides, weights, fault)
    gradients = join([place for place, _, _ in ranks], [shards for _, _, shards in ranks])
    tied_copy = gradients.pop("output_layer.weight", None) if THEIRS[name].tie_word_embeddings else None
    assert tied_copy is None or torch.equal(tied_copy, gradients["embedding.word_embeddings.weight"])
    return Found(ranks[0][1], gradients)


def errors(found: Found, name: str) -> dict[str, float]:
    """Relative to the truth, in the norm: of the losses, and of each parameter's gradient."""
    true = truth(name)
    assert set(found.gradients) == set(true.gradients)
    pairs = {key: (gradient, true.gradients[key]) for key, gradient in found.gradients.items()}
    pairs["losses"] = found.losses, true.losses
    return {key: ((a.double() - b).norm() / b.norm()).item() for key, (a, b) in pairs.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", THEIRS)
def test_losses_and_gradients_equal_transformers_in_fp64(name, layout):
    """About 100 roundings of 2^-53 on a path."""
    found = errors(run_ours(name, layout, "fp64"), name)
    assert max(found.values()) <= 1e-13, found


@pytest.mark.parametrize("layout", ["packed", "TP2xPP2 with sequence parallelism"])
@pytest.mark.parametrize("name", THEIRS)
def test_losses_and_gradients_equal_transformers_to_fp32_rounding(name, layout):
    """What a layout cuts and adds up shows in fp64, above, where nothing hides it."""
    found = errors(run_ours(name, layout, "fp32"), name)
    assert found.pop("losses") <= LOSS_ROUNDINGS * 2**-24
    assert max(found.values()) <= GRADIENT_ROUNDINGS * 2**-24, found


SHAPE = "model.shape."
MISTAKES = {
    "no window": ("gemma2", (f"{SHAPE}sliding_window=null",), None),
    "a window of one more": ("gemma2", (f"{SHAPE}sliding_window={WINDOW + 1}",), None),
    "a layer with the other's window": ("gemma2", (), "window"),
    "no attention softcap": ("gemma2", (f"{SHAPE}attention_softcap=null",), None),
    "no final softcap": ("gemma2", (f"{SHAPE}final_softcap=null",), None),
    "scores divided by sqrt(head size)": ("gemma2", (f"{SHAPE}query_pre_attn_scalar=null",), None),
    "no scale of the embedding": ("gemma2", (), "embedding"),
    "a norm that is not zero-centred": ("gemma2", (), "norm"),
    "no rope scaling": ("llama3", (f"{SHAPE}rope_scaling=null",), None),
    "another epsilon": ("qwen2", (f"{SHAPE}norm_epsilon=1e-6",), None),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_show(mistake):
    """In the losses, and fifty times above what is allowed."""
    name, changed, fault = MISTAKES[mistake]
    found = errors(run_ours(name, "packed", "fp32", changed, fault), name)["losses"]
    assert found > 50 * LOSS_ROUNDINGS * 2**-24


def run_rounded(weight: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """On one rank, in bf16: a Gemma-2 norm of the table's rows, and its embedding of all tokens."""
    config = resolved(*RUN, *OURS["gemma2"], "precision.compute=bf16", vocab_size=VOCAB_SIZE)
    model = build_model(config, start_process_groups(config.parallel, CPU), CPU)
    norm, embedding = model.decoder.layers[0].self_attention.linear_proj.post_norm, model.embedding
    norm.weight.data, embedding.word_embeddings.weight.data = weight, table
    return norm(table), embedding(torch.arange(VOCAB_SIZE).unsqueeze(0), None).squeeze(1)


def test_gemma2_rounds_to_bf16_where_transformers_does():
    """The norm multiplies before it rounds, the embedding's scale is rounded itself: bit for bit but for norms of
    which an fp32 sum in another order falls on the other side of a bf16 boundary."""
    weights = {key: value.bfloat16() for key, value in their_weights("gemma2").items()}
    weight, table = weights["model.norm.weight"], weights["model.embed_tokens.weight"]
    theirs = AutoModelForCausalLM.from_config(THEIRS["gemma2"], dtype=torch.bfloat16).model
    theirs.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    ((normed, embedded),) = run_distributed(1, run_rounded, weight, table)
    assert torch.equal(embedded, theirs.embed_tokens(torch.arange(VOCAB_SIZE)))
    assert (normed != theirs.norm(table)).float().mean() < 0.002


def initial_norms(overrides: tuple[str, ...]) -> dict[str, set[float]]:
    """On one rank: the values that each norm's weight begins with."""
    config = resolved(*RUN, *overrides, "precision.compute=bf16", vocab_size=VOCAB_SIZE)
    models = MegatronModels(config, start_process_groups(config.parallel, CPU), CPU)
    parameters = [p for block in models.store.blocks[Role.UPPER].values() for p in block.parameters]
    return {p.name: set(p.tensor.tolist()) for p in parameters if p.name.endswith("norm.weight")}


@pytest.mark.parametrize("name, num_norms, neutral", [("qwen2", 2 * 2 + 1, 1.0), ("gemma2", 6 * 4 + 1, 0.0)])
def test_norms_begin_by_changing_nothing(name, num_norms, neutral):
    (found,) = run_distributed(1, initial_norms, OURS[name])
    assert len(found) == num_norms
    assert all(values == {neutral} for values in found.values())
