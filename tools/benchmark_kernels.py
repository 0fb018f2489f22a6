"""Times the kernels, forward and backward, against what bounds them and against others' kernels; checks them first.

    python tools/benchmark_kernels.py --out FILE.json              every operation at every shape
    python tools/benchmark_kernels.py --only head_loss --quick     one operation, few shapes, short runs
    python tools/benchmark_kernels.py --check --ours               is ours right? times nothing

Only what passes its check gets a time (tools/benchmarks/kernel_checks.py); a peer that is absent, fails or cannot do a
shape is listed with the reason. Peers: pip install liger-kernel cut-cross-entropy "quack-kernels[cu13]". On a CPU the
shapes are tiny and the times mean nothing: they show that the tool works. Exits with status 1 if ours is wrong.
te_linear is left out where Transformer Engine cannot run; asked for by name, it then exits with status 2.
"""

import argparse
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron_scalebio.device import choose_device
from tools.benchmarks import kernel_cases, kernel_cases_activations, kernel_cases_te, kernel_cases_weights
from tools.benchmarks.environment import environment, write_results
from tools.benchmarks.kernel_checks import (
    BANDWIDTH,
    PEER_BOUND,
    RECOMPUTE,
    Case,
    Unsupported,
    find_fault,
    probe_in_words,
    probe_row,
    relative_errors,
)
from tools.benchmarks.timing import Ceilings, measure, measure_ceilings, release_memory

TE_LINEAR = "te_linear"  # left out where Transformer Engine cannot run
OPERATIONS = {
    "cross_entropy": kernel_cases.cross_entropy_cases,
    "head_loss": kernel_cases.head_loss_cases,
    "sums_by_id": kernel_cases.sums_by_id_cases,
    "adamw_update": kernel_cases_weights.adamw_update_cases,
    "sum_of_squares": kernel_cases_weights.sum_of_squares_cases,
    "fp8": kernel_cases_weights.fp8_cases,
    "frozen_linear": kernel_cases_weights.frozen_linear_cases,
    "frozen_linear_dgrad": kernel_cases_weights.frozen_linear_dgrad_cases,
    "gated_activation": kernel_cases_activations.gated_activation_cases,
    TE_LINEAR: kernel_cases_te.te_linear_cases,
}
SECONDS = {"cuda": 1.0, "cpu": 0.02}  # of runs per contender
QUICK_SECONDS = {"cuda": 0.2, "cpu": 0.02}

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, metavar="OP")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, shorter runs")
    parser.add_argument("--check", action="store_true", help="time nothing")
    parser.add_argument("--ours", action="store_true", help="leave the peers out")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers, written after every case")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    torch.set_float32_matmul_precision("highest")  # what fp32 is held against must be fp32, whatever the container says
    operations = args.only or list(OPERATIONS)
    if TE_LINEAR in operations and (reason := kernel_cases_te.why_not(device)):
        print(f"{TE_LINEAR} is left out: {reason}", flush=True)
        if args.only:
            return 2
        operations.remove(TE_LINEAR)
    seconds = (QUICK_SECONDS if args.quick else SECONDS)[device.type]
    command = "benchmark_kernels.py " + " ".join(sys.argv[1:] if argv is None else argv)
    content: dict[str, Any] = {"environment": environment(device, command=command)}
    print("\n".join(f"{key}: {value}" for key, value in content["environment"].items()), flush=True)
    ceilings = None
    if not args.check:
        ceilings = measure_ceilings(device, seconds)
        content["ceilings"] = asdict(ceilings)
        print_ceilings(ceilings, device)
    content |= {"rows": [], "targets": []}
    for operation in operations:
        for case in OPERATIONS[operation](device, args.quick):
            case = replace(case, peers=()) if args.ours else case
            rows = check(case, device)
            targets = []
            if ceilings is not None:
                measure_rows(case, rows, device, seconds, ceilings)
                targets = measured_targets(case, rows, ceilings)
            content["rows"] += rows
            content["targets"] += targets
            print_case(case, rows, targets)
            write_results(args.out, content)
    wrong = [row for row in content["rows"] if row["kind"] == "ours" and row["status"] != "right"]
    print(f"WRONG: {len(wrong)} checks of ours" if wrong else "all checks of ours passed")
    return 1 if wrong else 0


def check(case: Case, device: torch.device) -> list[Row]:
    """One row per contender: whether it is right, its errors and what they may be. Floors are not checked."""
    expected = case.reference(case.make_inputs(), True)
    plain = {} if case.rounding else case.reference(case.make_inputs(), False)
    plain_errors = relative_errors(plain, expected, None) if plain else {}
    rows = []
    for kind, contender in case.contenders():
        row: Row = {"operation": case.operation, "shape": case.shape, "contender": contender.name, "kind": kind}
        rows.append(row)
        if kind == "floor":
            row["status"] = "unchecked"
            continue
        try:
            outputs = contender.run(case.make_inputs())
            row["errors"] = relative_errors(outputs, expected, case.rows)
            peers = dict.fromkeys(expected, (0.0, PEER_BOUND))
            bounds = case.bounds(outputs, plain_errors) if kind == "ours" else peers
            del outputs
            row["allowed"] = {name: most for name, (_, most) in bounds.items()}
            row["reason"] = find_fault(row["errors"], bounds)
            if case.probes and contender is case.ours[0]:
                row["probes"] = [probe_row(p.name, p.measure(case.make_inputs()), p.least, p.most) for p in case.probes]
                failed = [probe_in_words(probe) for probe in row["probes"] if not probe["passed"]]
                row["reason"] = "; ".join([row["reason"], *failed] if row["reason"] else failed) or None
            row["status"] = "wrong" if row["reason"] else "right"
        except Exception as error:  # whatever a peer raises is its reason; ours counts as wrong, and the rest goes on
            row |= {"status": "failed", "reason": in_one_line(error)}
        release_memory(device)
    return rows


def measure_rows(case: Case, rows: list[Row], device: torch.device, seconds: float, ceilings: Ceilings) -> None:
    """Add times, and rates against the ceilings, to the rows that are not wrong: one right after the other."""
    for (_, contender), row in zip(case.contenders(), rows, strict=True):
        if row["status"] in ("wrong", "failed"):
            continue
        try:
            times = measure(partial(contender.run, case.make_inputs()), device, seconds)
        except Exception as error:
            row |= {"status": "failed", "reason": in_one_line(error)}
            continue
        finally:
            release_memory(device)
        row["milliseconds"] = asdict(times)
        if contender.num_bytes is not None:
            row["bytes"] = contender.num_bytes
            row["of_copy_bandwidth"] = contender.num_bytes / (times.median / 1e3) / ceilings.bytes_per_second
        if case.flops:
            row["flops"] = case.flops
            row["of_gemm_rate"] = case.flops / (times.median / 1e3) / ceilings.flops_per_second


def measured_targets(case: Case, rows: list[Row], ceilings: Ceilings) -> list[Row]:
    """Our time over that of what it is held against; None where one of them has no time."""
    medians = {row["contender"]: row["milliseconds"]["median"] for row in rows if "milliseconds" in row}
    recomputing = [medians[peer.name] for peer in case.peers if peer.recomputes and peer.name in medians]
    medians[RECOMPUTE] = min(recomputing, default=None)
    ours, num_bytes = medians.get(case.ours[0].name), case.ours[0].num_bytes
    medians[BANDWIDTH] = None if num_bytes is None else 1e3 * num_bytes / ceilings.bytes_per_second
    targets = []
    for target in case.targets:
        against = medians.get(target.against)
        ratio = ours / against if ours and against else None
        row = {"operation": case.operation, "shape": case.shape, "against": target.against, "ratio": ratio}
        targets.append(row | {"at_most": target.at_most, "met": None if ratio is None else ratio <= target.at_most})
    return targets


def in_one_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0][:160]
    if isinstance(error, ModuleNotFoundError):
        return f"not installed: {text}"
    return text if isinstance(error, Unsupported) else f"{type(error).__name__}: {text}"


def print_ceilings(ceilings: Ceilings, device: torch.device) -> None:
    copy, gemm = ceilings.bytes_per_second / 1e9, ceilings.flops_per_second / 1e12
    print(f"ceilings here: copy {copy:.0f} GB/s (read + write), bf16 GEMM {gemm:.1f} TFLOP/s")
    if device.type == "cpu":
        print("CPU TIMES, of tiny shapes: they show that the tool works and nothing else")


def print_case(case: Case, rows: list[Row], targets: list[Row]) -> None:
    print(f"\n{case.operation}  " + "  ".join(f"{key} {value}" for key, value in case.shape.items()))
    columns = ("error", "median ms", "p10", "p90", "GB/s", "% copy", "TFLOP/s", "% GEMM")
    print(f"  {'':28}" + "".join(f"{column:>10}" for column in columns))
    for row in rows:
        print(f"  {row['contender']:28}" + row_in_words(row))
        for probe in row.get("probes", ()):
            print("  " + probe_in_words(probe))
    for target in targets:
        print("  target: " + target_in_words(target))
    sys.stdout.flush()


def row_in_words(row: Row) -> str:
    text = f"{max(row['errors'].values()):10.1e}" if "errors" in row else f"{'':10}"
    if "milliseconds" not in row:
        return f"{text}  {row['status']}" + (f", NO TIME: {row['reason']}" if row.get("reason") else "")
    times = row["milliseconds"]
    text += "".join(f"{times[key]:10.4f}" for key in ("median", "p10", "p90"))
    for amount, scale, share in (("bytes", 1e9, "of_copy_bandwidth"), ("flops", 1e12, "of_gemm_rate")):
        known = amount in row
        text += f"{1e3 * row[amount] / times['median'] / scale:10.1f}{row[share]:10.0%}" if known else f"{'':20}"
    return text


def target_in_words(target: Row) -> str:
    wanted = f"at most {target['at_most']:.2f} x {target['against']}"
    if target["ratio"] is None:
        return f"{wanted}: not measured"
    return f"{wanted}: {target['ratio']:.2f}, {'met' if target['met'] else 'MISSED'}"


if __name__ == "__main__":
    sys.exit(main())
