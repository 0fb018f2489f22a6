"""Core attentions: what each computes, which is chosen, and how the CUDA ones call their libraries.

On a CPU flash-attn and torch's varlen_attn run as stand-ins of their documented interfaces; flex_attention runs
uncompiled, forward only.

Shapes: T = B * S tokens in B rows, h query heads, g key and value heads, d head size.
"""

import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from megatron_scalebio.config import ModelConfig, ShapeConfig, UserError
from megatron_scalebio.data import MicroBatch, build_micro_batch
from megatron_scalebio.device import CPU
from megatron_scalebio.mcore import attention
from megatron_scalebio.mcore.attention import (
    CoreAttention,
    FlashAttention,
    FlexAttention,
    SdpaAttention,
    SoftcapAttention,
    VarlenAttention,
    choose_attention,
)
from tests.mcore.runs import MAX_LENGTH, random_examples

CUDA = torch.device("cuda")
WINDOW, HEADS, GROUPS, HEAD_SIZE, SCALE = 5, 4, 2, 16, 0.3


def micro_batch(packed: bool) -> MicroBatch:
    """Three rows, the last of them empty."""
    examples = sorted(random_examples(7, (0,) * 9), key=lambda example: example.num_positions)
    rows = [[examples[-1]], [examples[1], examples[2], examples[0]]] if packed else [[examples[-1]], [examples[-2]]]
    return build_micro_batch(rows, MAX_LENGTH, 3, 0)


def build(backend: type[CoreAttention], layer: int = 1, window: int | None = WINDOW, softcap: float | None = None):
    config = SimpleNamespace(
        kv_channels=HEAD_SIZE, window_size=window and (window - 1, 0), window_attn_skip_freq=window and 2
    )
    return backend(config, layer_number=layer, softmax_scale=SCALE, row_length=MAX_LENGTH, softcap=softcap)


def qkv(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3 * MAX_LENGTH, n, HEAD_SIZE, generator=generator).double() for n in (HEADS, GROUPS, GROUPS)]


def by_the_definition(batch: MicroBatch, window: int | None, softcap: float | None) -> Tensor:
    """[T, h, d], one example, head and query at a time."""
    query, key, value = qkv()
    context = torch.empty_like(query)
    ends = batch.cu_seqlens.tolist()
    for start, end in zip(ends, ends[1:], strict=False):
        for token in range(start, end):
            first = start if window is None else max(start, token - window + 1)
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = SCALE * key[first : token + 1, group] @ query[token, head]
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                context[token, head] = scores.softmax(0) @ value[first : token + 1, group]
    return context


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """As flash-attn 2.6 documents it: query i sees keys i - left to i + right, -1 is no bound; causal besides."""
    assert dropout_p == 0.0 and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    ends = cu_seqlens_q.tolist()
    assert max(b - a for a, b in zip(ends, ends[1:], strict=False)) <= max_seqlen_q == max_seqlen_k
    left, right = (math.inf if bound < 0 else bound for bound in window_size)
    right = 0 if causal else right
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    context = []
    for start, end in zip(ends, ends[1:], strict=False):
        scores = softmax_scale * torch.einsum("qhd,khd->hqk", q[start:end], k[start:end])
        scores = scores if softcap == 0.0 else softcap * torch.tanh(scores / softcap)
        offset = torch.arange(end - start) - torch.arange(end - start)[:, None]  # key minus query
        scores = scores.masked_fill((offset > right) | (offset < -left), -torch.inf)
        context.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
    return torch.cat(context)


def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa, **_):
    """As torch documents it: (left, right), and no causality but by right = 0."""
    assert enable_gqa
    return flash_attn_varlen_func(
        *(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k), softmax_scale=scale, window_size=window_size
    )


@pytest.fixture
def libraries(monkeypatch):
    monkeypatch.setattr(attention, "_flash_attn_function", lambda: flash_attn_varlen_func)
    standing_in = mock.create_autospec(varlen.varlen_attn, side_effect=varlen_attn)  # refuses what torch would
    monkeypatch.setattr(varlen, "varlen_attn", standing_in)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("layer, window", [(1, WINDOW), (2, None)])
@pytest.mark.parametrize(
    "backend, softcap",
    [
        (SdpaAttention, None),
        (SoftcapAttention, 1.5),
        (FlexAttention, None),
        (FlexAttention, 1.5),
        (FlashAttention, None),
        (FlashAttention, 1.5),
        (VarlenAttention, None),
    ],
)
def test_every_attention_stays_in_its_example_and_window(libraries, packed, layer, window, backend, softcap):
    batch = micro_batch(packed)
    core, (query, key, value) = build(backend, layer, softcap=softcap), qkv()
    context = core(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), backend.prepare(batch, WINDOW))
    assert context.shape == (3 * MAX_LENGTH, 1, HEADS * HEAD_SIZE)
    expected = by_the_definition(batch, window, softcap).reshape(context.shape)
    torch.testing.assert_close(context, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, WINDOW])
def test_masks_are_transformers_own_inside_an_example(window):
    batch = micro_batch(packed=True)
    theirs = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    examples = attention.example_numbers(batch)
    (masks,) = SdpaAttention.prepare(batch, window)[window].transpose(0, 1)
    flex = attention.flex_mask(examples, window)
    for row in range(3):
        start = {number: examples[row].tolist().index(number) for number in examples[row].tolist()}
        for q, k in torch.cartesian_prod(torch.arange(MAX_LENGTH), torch.arange(MAX_LENGTH)):
            first, other = start[int(examples[row, q])], start[int(examples[row, k])]
            expected = first == other and bool(theirs(0, 0, q - first, k - first))
            assert masks[row, q, k] == flex(row, 0, q, k) == expected


@pytest.mark.parametrize("window, expected", [(None, [None] * 5), (7, [7, None, 7, None, 7])])
def test_layers_1_3_5_have_the_window(window, expected):
    assert [build(SdpaAttention, layer, window).window for layer in range(1, 6)] == expected


def test_scores_are_divided_by_the_root_of_the_head_size_unless_said():
    config = SimpleNamespace(kv_channels=16, window_size=None, window_attn_skip_freq=None)
    assert SdpaAttention(config, 1, None, MAX_LENGTH, None).scale == 0.25


def model(softcap: float | None = None, head_size: int = 256, window: int | None = None, implementation: str = "auto"):
    shape = ShapeConfig(head_size=head_size, attention_softcap=softcap, sliding_window=window)
    return ModelConfig(family="gemma2", shape=shape, implementation=implementation)


def before_softcap(q, k, v, window_size=(-1, -1)): ...


@pytest.mark.parametrize(
    "flash_attn, device, dtype, softcap, head_size, expected",
    [
        (flash_attn_varlen_func, CUDA, torch.bfloat16, 50.0, 256, FlashAttention),
        (flash_attn_varlen_func, CUDA, torch.bfloat16, None, 256, FlashAttention),
        (flash_attn_varlen_func, CUDA, torch.bfloat16, None, 264, FlexAttention),
        (flash_attn_varlen_func, CUDA, torch.float32, 50.0, 256, SoftcapAttention),
        (flash_attn_varlen_func, CPU, torch.bfloat16, 50.0, 256, SoftcapAttention),
        (before_softcap, CUDA, torch.bfloat16, 50.0, 256, FlexAttention),
        (before_softcap, CUDA, torch.bfloat16, None, 256, FlashAttention),
        (None, CUDA, torch.bfloat16, 50.0, 256, FlexAttention),
        (None, CUDA, torch.bfloat16, None, 256, VarlenAttention),
        (None, CUDA, torch.bfloat16, None, 12, SdpaAttention),
        (None, CUDA, torch.float32, None, 256, SdpaAttention),
        (None, CPU, torch.float64, None, 256, SdpaAttention),
        (None, CPU, torch.float64, 50.0, 256, SoftcapAttention),
    ],
)
def test_the_choice(monkeypatch, flash_attn, device, dtype, softcap, head_size, expected):
    monkeypatch.setattr(attention, "_flash_attn_function", lambda: flash_attn)
    choice = choose_attention(model(softcap, head_size, window=4096), device, dtype)
    assert choice.backend is expected
    assert choice.line.startswith(expected.name)
    for part in (f"heads of {head_size}", "a window of 4096", *(["softcap 50"] if softcap else [])):
        assert part in choice.line


def test_the_choice_is_transformer_engines_own_under_te():
    assert choose_attention(model(implementation="te"), CUDA, torch.bfloat16).backend is None


def test_what_no_attention_can_do_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(attention, "_flash_attn_function", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        choose_attention(model(50.0), CUDA, torch.bfloat16)
    message = str(error.value)
    assert message.startswith(
        "model.family=gemma2: no attention is there for heads of 256, bfloat16 on cuda, softcap 50"
    )
    for part in ("flash-attn is not installed", "varlen_attn has no softcap", "flex_attention needs Triton"):
        assert part in message
    assert message.endswith("install flash-attn 2.6 or newer, or set precision.compute=fp32")
