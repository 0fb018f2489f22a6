"""What a comparison says to do, in a sentence. Only a paired difference whose interval leaves out 0 decides."""

from statistics import fmean
from typing import Any

# The cheaper to set up and to explain, the earlier; of arms that cannot be told apart the first is the one to use.
SIMPLEST = ("uniform", "natural", "given", "validation", "validation_added", "one_stage_upper", "one_stage_lower")
SIMPLEST += ("learned", "random")

# Of the budget: a run has whole steps, and where batches follow the weights their length is known only in the end.
TOLERANCE = 0.05


def verdict(content: dict[str, Any]) -> str:
    """Of compare.json's content."""
    arms = content["arms"]
    if not arms:
        return "Nothing has been run yet."
    names, best = [arm["name"] for arm in arms], arms[0]["name"]
    num_seeds = min(len(arm["seeds"]) for arm in arms)
    if len(arms) == 1:
        return f"Only {best} has been run: there is nothing to compare it with."
    if num_seeds < 2:
        return f"{best} has the lowest test loss, but one seed says nothing about chance: run at least two more seeds."
    table = _differences(content["paired"])
    if len(table) < len(arms) * (len(arms) - 1):
        return (
            f"{best} has the lowest test loss, but some arms have less than two seeds in common: run what is missing."
        )
    unbeaten = [name for name in names if all(table[name, other][0] <= 0 for other in names if other != name)]
    best = (unbeaten or names)[0]
    others = [name for name in names if name != best]
    told = over_budget(content)
    ties = [name for name in others if table[best, name][2] >= 0]
    if ties:
        simplest = min([best, *ties], key=SIMPLEST.index)
        return (
            f"{best} has the lowest mean test loss, but with {num_seeds} seeds it cannot be told from"
            f" {', '.join(ties)}: use {simplest}, the simplest of them, or run more seeds.{told}"
        )
    second = max(others, key=lambda name: table[best, name][1])
    low, mean, high = table[best, second]
    learned = {"learned": "Learn the weights and train a fresh model with them", "random": "Search random mixtures"}
    learned |= {"one_stage_upper": "Use the bilevel run's upper model", "one_stage_lower": "Use its lower model"}
    learned |= {"validation": "Train on the validation records alone", "uniform": "Weigh all sources the same"}
    what = learned.get(best, f"Use {best}")
    equal = "" if told else "at equal cost "
    return (
        f"{what}: {equal}its test loss is lower than that of every other arm, than {second}'s by"
        f" {-mean:.3g} (95% interval {-high:.3g} to {-low:.3g}, {num_seeds} seeds).{told}"
    )


def _differences(paired: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float, float]]:
    """{(arm, other): low, mean, high of its test loss less the other's}, either way round; of intervals alone."""
    table = {}
    for row in paired:
        if row["interval"] is None:
            continue
        mean, (low, high) = row["difference_mean"], row["interval"]
        table[row["arm"], row["against"]] = low, mean, high
        table[row["against"], row["arm"]] = -high, -mean, -low
    return table


def over_budget(content: dict[str, Any]) -> str:
    """Which arms have spent noticeably more or less than the budget, in a sentence; empty where none has."""
    budget = content["budget_flops"]
    spent = {arm["name"]: fmean(seed["flops"] for seed in arm["seeds"]) / budget - 1 for arm in content["arms"]}
    off = [f"{name} {share:+.0%}" for name, share in spent.items() if abs(share) > TOLERANCE]
    return f" Not at equal cost: executed FLOPs beside the budget, {', '.join(off)}." if off else ""
