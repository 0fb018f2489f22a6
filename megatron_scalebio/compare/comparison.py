"""Arms with seeds, resumable: compare.json after every result, compare.html beside it."""

import json
import signal
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

from megatron_scalebio.compare.arms import ARMS, NONE, Arm, Result
from megatron_scalebio.compare.page import write_page
from megatron_scalebio.compare.runs import ArmRuns, Failed, Processes, Stopped, Terms, flops_of_step
from megatron_scalebio.compare.statistics import interval_of_mean
from megatron_scalebio.compare.verdict import verdict
from megatron_scalebio.config import UserError, changed, config_sha256, load_config
from megatron_scalebio.data import Dataset
from megatron_scalebio.run import Run, open_run
from megatron_scalebio.run_folder import replace_file


def compare(
    config_file: str | None,
    overrides: Sequence[str],
    *,
    arms: Sequence[str] | None,
    seeds: int,
    budget_flops: float | None = None,
    steps: int | None = None,
    learning_share: float = 0.5,
    mixtures: int = 8,
    num_ranks: int | None = None,
    at_once: int = 1,
) -> int:
    """Run what the folder `run.output_dir` lacks of a comparison. Returns the exit status.

    Args:
        arms: names of `ARMS`; None: all, `given` only if weights are.
        seeds: 1 to this.
        budget_flops: executed FLOPs of each arm with each seed; None: what `steps` bilevel steps execute.
        steps: None: `bilevel.steps`.
        learning_share: of the budget, for arms that learn or search before a fresh model is trained.
        mixtures: of the arm `random`.
        num_ranks: of each run; None: tensor times pipeline parallelism.
        at_once: runs.

    Raises: UserError, before the first step where it can be known.
    """
    chosen = _chosen(list(ARMS) if arms is None else arms)
    _check_numbers(seeds, budget_flops, steps, learning_share, mixtures, at_once)
    run = _open(config_file, overrides, num_ranks)
    config = run.config
    if arms is None and config.bilevel.weights is None:
        chosen.remove(ARMS["given"])
    world = num_ranks or config.parallel.tensor * config.parallel.pipeline
    if budget_flops is None:
        budget_flops = (steps or config.bilevel.steps) * flops_of_step(run, world)
    folder = Path(config.run.output_dir).absolute()
    terms = Terms(config, world, at_once, budget_flops, learning_share, mixtures, folder)
    counts = run.dataset.num_examples
    file, head = folder / "compare.json", _head(terms, run.dataset)
    results = _read(file, head)
    processes = Processes()
    jobs = [
        (arm, ArmRuns(terms, arm.name, seed, counts, processes))
        for seed in range(1, seeds + 1)
        for arm in chosen
        if any((name, seed) not in results for name in arm.validation)
    ]
    for arm in {id(arm): arm for arm, _ in jobs}.values():
        arm.run(ArmRuns(terms, arm.name, 1, counts, processes, dry=True))
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, head, results)
    status = _run_all(jobs, processes, results, file, head, at_once)
    print(_table(content_of(head, results)))
    print(f"comparison: {file.with_suffix('.html')}")
    return status


def _run_all(
    jobs: list[tuple[Arm, ArmRuns]],
    processes: Processes,
    results: dict[tuple[str, int], Result],
    file: Path,
    head: dict[str, Any],
    at_once: int,
) -> int:
    writing = Lock()  # arms that end together write the same file

    def work(arm: Arm, runs: ArmRuns) -> None:
        done = arm.run(runs)
        with writing:
            for name, result in done.items():
                results[name, runs.seed] = result
                told = f"test loss {result.test_loss:.4f}  {result.flops:.3g} FLOPs"
                print(f"seed {runs.seed}  {name}: {told}", flush=True)
            _write(file, head, dict(results))

    previous = {number: signal.signal(number, lambda got, _: processes.stop(got)) for number in _SIGNALS}
    try:
        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(work, arm, runs) for arm, runs in jobs]
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future.done() and not future.cancelled() and future.exception()]
            if failed:
                pool.shutdown(wait=False, cancel_futures=True)
                processes.stop(processes.received or signal.SIGTERM)
                failed[0].result()
    except Stopped:
        print("stopped by a signal: the same command continues", flush=True)
        return 128 + (processes.received or signal.SIGTERM)
    except Failed as error:
        print(f"error: {error}", flush=True)
        return 1
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def content_of(head: dict[str, Any], results: dict[tuple[str, int], Result]) -> dict[str, Any]:
    """What compare.json holds: arms from the lowest mean test loss on, over the seeds that all have (where there are
    any), and the differences of every two of them.
    """
    uses = {name: use for arm in ARMS.values() for name, use in arm.validation.items()}
    by_arm: dict[str, dict[int, Result]] = {}
    for (name, seed), result in sorted(results.items(), key=lambda item: item[0]):
        by_arm.setdefault(name, {})[seed] = result
    of_all = set.intersection(*(set(mine) for mine in by_arm.values())) if by_arm else set()

    def standing(name: str) -> float:
        return fmean(result.test_loss for seed, result in by_arm[name].items() if seed in of_all or not of_all)

    names = sorted(by_arm, key=standing)
    rows = []
    for name in names:
        losses = [result.test_loss for result in by_arm[name].values()]
        seeds = [{"seed": seed, **asdict(result)} for seed, result in by_arm[name].items()]
        rows.append(
            {
                "name": name,
                "test_loss_mean": fmean(losses),
                "interval": interval_of_mean(losses),
                "sees_validation": uses[name] != NONE,
                "validation": uses[name],
                "seeds": seeds,
            }
        )
    paired = []
    for first, second in combinations(names, 2):
        both = sorted(by_arm[first].keys() & by_arm[second].keys())
        differences = [by_arm[first][seed].test_loss - by_arm[second][seed].test_loss for seed in both]
        if differences:
            mean, interval = fmean(differences), interval_of_mean(differences)
            paired.append({"arm": first, "against": second, "difference_mean": mean, "interval": interval})
    content = {**head, "arms": rows, "paired": paired}
    return content | {"verdict": verdict(content)}


def _chosen(names: Sequence[str]) -> list[Arm]:
    unknown = [name for name in names if name not in ARMS]
    if unknown or not names:
        raise UserError(f"--arms {','.join(unknown) or 'is empty'}: there are {', '.join(ARMS)}")
    if len(set(names)) < len(names):
        raise UserError(f"--arms {','.join(names)}: names an arm twice")
    return [ARMS[name] for name in names]


def _check_numbers(
    seeds: int, budget_flops: float | None, steps: int | None, learning_share: float, mixtures: int, at_once: int
) -> None:
    if budget_flops is not None and steps is not None:
        raise UserError(f"--budget {budget_flops:g} and --steps {steps}: give one of them")
    for name, value in (("seeds", seeds), ("steps", steps), ("mixtures", mixtures), ("at-once", at_once)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: must be at least 1")
    if budget_flops is not None and not 0 < budget_flops < float("inf"):
        raise UserError(f"--budget {budget_flops}: must be positive and finite")
    if not 0 < learning_share < 1:
        raise UserError(f"--learning-share {learning_share}: must lie between 0 and 1")


def _open(config_file: str | None, overrides: Sequence[str], num_ranks: int | None) -> Run:
    """The bilevel run that the arms are variants of, with the weights that arm `given` trains with, which may be 0, and
    the limit of repetition, which each run is checked against with its own number of steps.

    Raises: UserError.
    """
    loaded = load_config(config_file, list(overrides))
    world = num_ranks or loaded.parallel.tensor * loaded.parallel.pipeline
    learns = ["bilevel.mode=bilevel", "bilevel.weights=null", "data.max_epochs=null"]
    run = open_run(config_file, [*overrides, *learns], world_size=world, writes=False)
    own = {"bilevel.weights": loaded.bilevel.weights, "data.max_epochs": loaded.data.max_epochs}
    run = replace(run, config=changed(run.config, own))
    if not run.dataset.test:
        raise UserError("data.test is not set: a comparison is made on a test set that no arm has seen")
    return run


def _head(terms: Terms, dataset: Dataset) -> dict[str, Any]:
    """What makes a comparison this one; more arms and seeds may be added, and `given_weights` with arm `given`."""
    config = changed(terms.config, {"run.seed": 1, "bilevel.weights": None})
    return {
        "budget_flops": terms.budget_flops,
        "learning_share": terms.learning_share,
        "mixtures": terms.mixtures,
        "ranks": terms.num_ranks,
        "config_sha256": config_sha256(config),
        "dataset_fingerprint": dataset.fingerprint,
        "test_fingerprint": dataset.test_fingerprint,
        "given_weights": terms.config.bilevel.weights,
    }


def _read(file: Path, head: dict[str, Any]) -> dict[tuple[str, int], Result]:
    """The results that a folder has; what they were given as weights comes into `head`, unless it has other ones.

    Raises: UserError, if they are of another comparison.
    """
    folder = file.parent
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"run.output_dir={folder} holds {', '.join(sorted(path.name for path in folder.iterdir())[:5])} and no"
                " compare.json: name another folder"
            )
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if head["given_weights"] is None or all(arm["name"] != "given" for arm in content["arms"]):
            content["given_weights"] = head["given_weights"] = head["given_weights"] or content.get("given_weights")
        differing = [
            f"{key}: {content.get(key)} there, {head[key]} here" for key in head if content.get(key) != head[key]
        ]
        rows = [(arm["name"], row) for arm in content["arms"] for row in arm["seeds"]]
        results = {(name, row.pop("seed")): Result(**row) for name, row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error!r}): name another run.output_dir") from None
    if differing:
        raise UserError(
            f"run.output_dir={folder} holds another comparison; name another folder:\n  " + "\n  ".join(differing)
        )
    return results


def _write(file: Path, head: dict[str, Any], results: dict[tuple[str, int], Result]) -> None:
    content = content_of(head, results)
    replace_file(file, json.dumps(content, indent=1, allow_nan=False) + "\n")
    write_page(file.with_suffix(".html"), content)


def _table(content: dict[str, Any]) -> str:
    lines = [f"{'arm':<18}{'test loss':>10}  {'95% interval':<18}{'steps':>8}{'FLOPs':>10}  validation records"]
    for arm in content["arms"]:
        interval = "" if arm["interval"] is None else "{:.4f} .. {:.4f}".format(*arm["interval"])
        steps, flops = (fmean(row[key] for row in arm["seeds"]) for key in ("steps", "flops"))
        lines.append(
            f"{arm['name']:<18}{arm['test_loss_mean']:>10.4f}  {interval:<18}{steps:>8.0f}{flops:>10.3g}"
            f"  {arm['validation']}"
        )
    return "\n".join([*lines, content["verdict"]])
