"""What a comparison says to do, in a sentence. Only a paired difference whose interval leaves out 0 decides."""

from typing import Any

# The cheaper to set up and to explain, the earlier; of arms that cannot be told apart the first is the one to use.
SIMPLEST = ("uniform", "natural", "given", "validation", "validation_added", "one_stage_upper", "one_stage_lower")
SIMPLEST += ("learned", "random")


def verdict(content: dict[str, Any]) -> str:
    """Of compare.json's content."""
    arms = content["arms"]
    if not arms:
        return "Nothing has been run yet."
    best = arms[0]["name"]
    num_seeds = min(len(arm["seeds"]) for arm in arms)
    if len(arms) == 1:
        return f"Only {best} has been run: there is nothing to compare it with."
    if num_seeds < 2:
        return f"{best} has the lowest test loss, but one seed says nothing about chance: run at least two more seeds."
    differences = {row["against"]: row for row in content["paired"] if row["arm"] == best}
    ties = [name for name, row in differences.items() if row["interval"][1] >= 0]
    if ties:
        simplest = min([best, *ties], key=SIMPLEST.index)
        return (
            f"{best} has the lowest mean test loss, but with {num_seeds} seeds it cannot be told from"
            f" {', '.join(ties)}: use {simplest}, the simplest of them, or run more seeds."
        )
    second = arms[1]["name"]
    row = differences[second]
    low, high = row["interval"]
    learned = {"learned": "Learn the weights and train a fresh model with them", "random": "Search random mixtures"}
    learned |= {"one_stage_upper": "Use the bilevel run's upper model", "one_stage_lower": "Use its lower model"}
    learned |= {"validation": "Train on the validation records alone", "uniform": "Weigh all sources the same"}
    what = learned.get(best, f"Use {best}")
    return (
        f"{what}: at equal cost its test loss is lower than that of every other arm, than {second}'s by"
        f" {-row['difference_mean']:.3g} (95% interval {-high:.3g} to {-low:.3g}, {num_seeds} seeds)."
    )
