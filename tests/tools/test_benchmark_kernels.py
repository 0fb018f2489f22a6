"""The kernel benchmark on a CPU, on tiny shapes: what it says of kernels that are right, wrong, absent."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_scalebio.kernels import fp8, head_loss
from tools import benchmark_kernels
from tools.benchmarks import (
    kernel_cases,
    kernel_cases_activations,
    kernel_cases_te,
    kernel_cases_weights,
    kernel_peers,
)
from tools.benchmarks.kernel_checks import Contender


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_no_process_group_left():
    found, threads = dist.is_initialized(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if not found and dist.is_initialized():
        dist.destroy_process_group()


def run(folder, *arguments: str) -> tuple[int, dict]:
    """Exit status and the JSON it wrote."""
    file = folder / "results" / "kernels.json"
    status = benchmark_kernels.main(["--device", "cpu", "--quick", "--out", str(file), *arguments])
    return status, json.loads(file.read_text())


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return run(tmp_path_factory.mktemp("everything"))


def test_every_kernel_of_ours_is_right_and_timed(everything):
    status, content = everything
    assert status == 0
    ours = [row for row in content["rows"] if row["kind"] == "ours"]
    assert {row["operation"] for row in ours} == set(benchmark_kernels.OPERATIONS) - {benchmark_kernels.TE_LINEAR}
    for row in ours:
        assert row["status"] == "right" and row["reason"] is None
        assert all(error <= row["allowed"][name] for name, error in row["errors"].items())
        times = row["milliseconds"]
        assert 0 < times["p10"] <= times["median"] <= times["p90"] and times["runs"] >= 5
        assert ("of_copy_bandwidth" in row) == ("bytes" in row)
    assert all("bytes" in row for row in ours if row["operation"] in ("cross_entropy", "adamw_update", "fp8"))
    trained = [row for row in ours if row["shape"].get("head") == "trained"]
    assert trained and all(
        set(row["errors"]) == {"loss", "token_losses", "grad_hidden", "grad_weight"} for row in trained
    )


def test_the_file_says_where_its_numbers_come_from_and_what_they_are_held_against(everything):
    _, content = everything
    environment = content["environment"]
    assert environment["command"].endswith("kernels.json") and "CPU" in environment["device"]
    assert {"commit", "date", "settings", "world_size"} <= set(environment)
    assert {"python", "torch", "triton", "megatron-core", "liger-kernel"} <= set(environment["versions"])
    assert min(content["ceilings"].values()) > 0
    against = {target["against"] for target in content["targets"]}
    assert {"its 2 GEMMs in cuBLAS", "its 3 GEMMs in cuBLAS", kernel_cases_weights.CUBLAS} <= against
    for target in content["targets"]:
        assert (
            target["met"] is None
            if target["ratio"] is None
            else target["met"] == (target["ratio"] <= target["at_most"])
        )


def test_whatever_has_no_time_has_a_reason_in_one_line(everything):
    _, content = everything
    names = {row["contender"] for row in content["rows"]}
    peers = (*kernel_peers.CROSS_ENTROPY, *kernel_peers.HEAD_LOSS, *kernel_peers.ADAMW, *kernel_peers.FROZEN_LINEAR)
    assert names >= {peer.name for peer in peers}
    for row in content["rows"]:
        assert "milliseconds" in row or (row["reason"] and "\n" not in row["reason"])


def test_an_absent_peer_is_listed_as_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    status, content = run(tmp_path, "--only", "cross_entropy")
    liger = [row for row in content["rows"] if row["contender"] == "Liger"]
    assert status == 0 and liger
    for row in liger:
        assert row["reason"].startswith("not installed") and "milliseconds" not in row
    assert "NO TIME: not installed" in capsys.readouterr().out


def scaled(operation, factor: float):
    return lambda *args, **kwargs: operation(*args, **kwargs) * factor


def with_scaled_loss(operation, factor: float):
    def run(*args):
        loss, token_losses = operation(*args)
        return loss * factor, token_losses

    return run


def with_scaled_lr(operation, factor: float):
    return lambda *args, lr, **kwargs: operation(*args, lr=factor * lr, **kwargs)


@pytest.mark.parametrize(
    "operation, module, name, spoil, factor, output",
    [
        ("cross_entropy", kernel_cases, "cross_entropy", scaled, 1 + 1e-5, "token_losses"),
        ("head_loss", kernel_cases, "head_loss", with_scaled_loss, 1.02, "grad_hidden"),
        ("sums_by_id", kernel_cases, "sums_by_id", scaled, 1 + 1e-9, "sums"),
        ("adamw_update", kernel_cases_weights, "adamw_update", with_scaled_lr, 1 + 1e-4, "master"),
        ("sum_of_squares", kernel_cases_weights, "sum_of_squares", scaled, 1 + 1e-9, "sum"),
        ("frozen_linear", kernel_cases_weights, "frozen_linear", scaled, 1.02, "grad_x"),
        ("frozen_linear_dgrad", kernel_cases_weights, "matmul", scaled, 1.02, "grad_x"),
        ("gated_activation", kernel_cases_activations, "gated_activation", scaled, 1.02, "grad_gate_and_up"),
    ],
)
def test_a_slightly_wrong_kernel_gets_no_time(tmp_path, monkeypatch, operation, module, name, spoil, factor, output):
    monkeypatch.setattr(module, name, spoil(getattr(module, name), factor))
    status, content = run(tmp_path, "--only", operation, "--ours")
    assert status == 1
    for row in content["rows"]:
        if row["kind"] == "ours":
            assert row["status"] == "wrong" and f"{output} off by" in row["reason"]
            assert "milliseconds" not in row
    assert all(target["ratio"] is None for target in content["targets"])


def rounded_logits(a, b, out):
    out.copy_((a.float() @ b.float()).bfloat16())


def rounded_sums(a, b, out):
    out.copy_((out + a.float() @ b.float()).bfloat16())


def larger_scale(x, block_rows):
    q = fp8.quantize(x, block_rows)
    return replace(q, scale=1.5 * q.scale) if block_rows == fp8.SCALE_BLOCK else q


@pytest.mark.parametrize(
    "operation, module, name, faulty, output",
    [
        ("head_loss", head_loss, "_multiply", rounded_logits, "token_losses"),
        ("head_loss", head_loss, "_add_product", rounded_sums, "grad_weight"),
        ("frozen_linear", kernel_cases_weights, "quantize", larger_scale, "y"),
        ("fp8", kernel_cases_weights, "quantize", larger_scale, "scale"),
    ],
)
def test_rounding_where_there_must_be_none_is_found(tmp_path, monkeypatch, operation, module, name, faulty, output):
    """The faults that only a GPU's own code paths could have, and that this tool is the one to see."""
    monkeypatch.setattr(module, name, faulty)
    monkeypatch.setitem(head_loss.TOKENS_PER_CHUNK, "cpu", 16)
    status, content = run(tmp_path, "--only", operation, "--ours", "--check")
    assert status == 1
    assert any(f"{output} off by" in row["reason"] for row in content["rows"] if row["status"] == "wrong")


def test_a_kernel_that_raises_is_wrong_too_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError("first line\nsecond line")

    monkeypatch.setattr(kernel_cases, "sums_by_id", broken)
    status, content = run(tmp_path, "--only", "sums_by_id", "sum_of_squares")
    assert status == 1
    failed, *others = content["rows"]
    assert failed["reason"] == "ValueError: first line" and "milliseconds" not in failed
    assert all("milliseconds" in row for row in others)


def test_a_peer_that_takes_one_tokens_coefficient_for_all_gets_no_time(tmp_path, monkeypatch):
    def first_coefficient(inputs):
        same = replace(inputs, loss_coef=inputs.loss_coef[:1].expand_as(inputs.loss_coef))
        right, wrong = (kernel_peers.HEAD_LOSS[0].run(each) for each in (inputs, same))
        return right | {"grad_hidden": wrong["grad_hidden"]}

    peers = (kernel_peers.HEAD_LOSS[0], Contender("first coefficient", first_coefficient))
    monkeypatch.setattr(kernel_cases.kernel_peers, "HEAD_LOSS", peers)
    status, content = run(tmp_path, "--only", "head_loss")
    assert status == 0  # it is none of ours
    for row in content["rows"]:
        if row["contender"] == "first coefficient":
            assert "grad_hidden off by" in row["reason"] and "milliseconds" not in row


def test_check_times_nothing(tmp_path):
    status, content = run(tmp_path, "--only", "sum_of_squares", "--check", "--ours")
    assert status == 0 and [row["status"] for row in content["rows"]] == ["right"]
    assert "ceilings" not in content and not any("milliseconds" in row for row in content["rows"])


class InFP8:
    """Stands in for `FP8Product` on a CPU: the operands, rounded as the recipe rounds them, multiplied in fp32."""

    def __init__(self, weight, recipe):
        self.weight, self.recipe = weight, recipe

    def __call__(self, x):
        return _Product.apply(x, self.weight, self)

    def rounded(self, tensor, is_grad=False):
        if self.recipe == "tensorwise":
            dtype = torch.float8_e5m2 if is_grad else torch.float8_e4m3fn
            scale = tensor.abs().max().float() / torch.finfo(dtype).max
            return (tensor / scale).to(dtype).float() * scale
        return fp8.dequantize_reference(fp8.quantize_reference(tensor.flatten(0, -2), 1), torch.float32).view(
            tensor.shape
        )

    def add(self, gradient):
        self.weight.main_grad.add_(gradient)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, product):
        ctx.product, x, weight = product, product.rounded(x), product.rounded(weight.detach())
        ctx.save_for_backward(x, weight)
        return (x @ weight.T).bfloat16()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = ctx.product.rounded(grad, is_grad=True)
        ctx.product.add(grad.flatten(0, 1).T @ x.flatten(0, 1))
        return (grad @ weight).bfloat16(), None, None


class InBF16(InFP8):
    def rounded(self, tensor, is_grad=False):
        return tensor.float()


class WithCoarserGradients(InFP8):
    """As if every gradient were rounded as e5m2 rounds, in a recipe that has e4m3."""

    def rounded(self, tensor, is_grad=False):
        return tensor.to(torch.float8_e5m2).float() if is_grad else super().rounded(tensor)


class Overwriting(InFP8):
    def add(self, gradient):
        self.weight.main_grad.copy_(gradient)


class WithHistory(InFP8):
    """Of what another weight's product saw before, as delayed scaling would have it."""

    seen = 0

    def __call__(self, x):
        WithHistory.seen += 1
        return super().__call__(x) * (1 + 2**-6 * (WithHistory.seen % 2))


def run_te_linear(folder, monkeypatch, product=InFP8, kept=1.03):
    """Exit status, and the rows of ours by recipe."""
    monkeypatch.setattr(kernel_cases_te, "why_not", lambda device: None)
    monkeypatch.setattr(kernel_cases_te.te_linear, "FP8Product", product)
    monkeypatch.setattr(kernel_cases_te, "kept_bytes", lambda call: kept * call().shape[0] * 384)
    status, content = run(folder, "--only", "te_linear")
    return status, {row["shape"]["recipe"]: row for row in content["rows"] if row["kind"] == "ours"}


def test_products_that_round_to_fp8_are_right_and_timed_beside_bf16(tmp_path, monkeypatch):
    status, rows = run_te_linear(tmp_path, monkeypatch)
    assert status == 0 and rows.keys() == kernel_cases_te.ROUNDING.keys()
    for recipe, row in rows.items():
        assert row["status"] == "right" and row["milliseconds"]["median"] > 0
        assert row["errors"].keys() == kernel_cases_te.ROUNDING[recipe].keys()
        assert [probe["passed"] for probe in row["probes"]] == [True, True]


@pytest.mark.parametrize(
    "product, kept, recipe, reason",
    [
        (InBF16, 1.03, "blockwise", "y off by"),
        (WithCoarserGradients, 1.03, "blockwise", "grad_x off by"),
        (Overwriting, 1.03, "tensorwise", "grad_weight off by"),
        (WithHistory, 1.03, "tensorwise", "differ between equal weights"),
        (InFP8, 3.5, "blockwise", "bytes kept"),
    ],
)
def test_products_that_are_not_what_fp8_must_be_get_no_time(tmp_path, monkeypatch, product, kept, recipe, reason):
    status, rows = run_te_linear(tmp_path, monkeypatch, product, kept)
    assert status == 1 and rows[recipe]["status"] == "wrong" and reason in rows[recipe]["reason"]
    assert "milliseconds" not in rows[recipe]


def test_without_transformer_engine_its_products_are_left_out_or_refused_where_they_alone_are_asked_for(
    monkeypatch, capsys
):
    monkeypatch.setattr(benchmark_kernels, "OPERATIONS", {name: lambda *_: [] for name in benchmark_kernels.OPERATIONS})
    assert benchmark_kernels.main(["--device", "cpu", "--check"]) == 0
    assert benchmark_kernels.main(["--device", "cpu", "--check", "--only", "te_linear"]) == 2
    assert capsys.readouterr().out.count("te_linear is left out: its products need a GPU") == 2
