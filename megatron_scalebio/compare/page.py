"""compare.html: a comparison for a person, in one file that needs no network."""

from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_scalebio.run_folder import replace_file
from megatron_scalebio.show.charts import COLORS, ticks
from megatron_scalebio.show.console import duration
from megatron_scalebio.show.report import STYLE

WIDTH, LEFT, RIGHT, ROW, TOP = 800, 150, 90, 30, 34

CHART_STYLE = """
.chart text { font: 12px system-ui, sans-serif; fill: #444; }
.chart .title { font-size: 14px; font-weight: 600; fill: #1c1c1c; }
.chart .grid { stroke: #8884; stroke-width: 1; }
.chart .interval { stroke-width: 8; opacity: .3; stroke-linecap: round; }
body { max-width: 960px; } td.number { white-space: nowrap; }
.verdict { font-size: 1.05rem; color: inherit; border-left: 4px solid #2f7ed8; padding-left: .8rem; }
@media (prefers-color-scheme: dark) { .chart text { fill: #bbb; } .chart .title { fill: #eee; } }
"""


def write_page(file: Path, content: dict[str, Any]) -> None:
    """`content` is compare.json's."""
    arms = content["arms"]
    parts = []
    if arms:
        parts = [
            losses_svg(arms),
            "<h2>Arms</h2>",
            _arms_table(arms),
            "<h2>Weights, means over seeds</h2>",
            *(weights_svg(group) for group in _by_sources(arms)),
            "<h2>Differences, seed by seed</h2>",
            _paired_table(content["paired"]),
            "<p>Test loss of the arm less that of the other, the mean over seeds that both have, with Student's 95%"
            " interval. Each is its own: of twenty such intervals one may miss.</p>",
        ]
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>comparison</title><style>{STYLE}{CHART_STYLE}</style></head><body>
<h1>What data to train on</h1>
<p class="verdict">{escape(content["verdict"])}</p>
<p>Every arm has a budget of {content["budget_flops"]:.3g} executed FLOPs with each seed; learning or searching for
weights is paid from it ({content["learning_share"]:.0%} of it, before a fresh model is trained).</p>
{"".join(parts)}
<p>Configuration <code>{content["config_sha256"]}</code></p>
</body></html>
"""
    replace_file(file, text)


def losses_svg(arms: list[dict[str, Any]]) -> str:
    """A row for each arm: its seeds as dots, their mean as a line, the mean's interval as a bar."""
    losses = [seed["test_loss"] for arm in arms for seed in arm["seeds"]]
    low, high = min(losses), max(losses)
    marks = ticks(low, high)
    low, high = min(marks[0], low), max(marks[-1], high)
    height = TOP + ROW * len(arms) + 40

    def across(loss: float) -> float:
        inside = min(max(loss, low), high)
        return LEFT + (inside - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    bottom = TOP + ROW * len(arms)
    parts = [f'<text class="title" x="{LEFT}" y="18">Test loss: seeds, mean, 95% interval of the mean</text>']
    for mark in marks:
        parts.append(f'<path class="grid" d="M{across(mark):.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{across(mark):.1f}" y="{bottom + 18}" text-anchor="middle">{mark:.4g}</text>')
    for index, arm in enumerate(arms):
        y, color = TOP + ROW * (index + 0.5), COLORS[2 if arm["sees_validation"] else 0]
        parts.append(f'<text x="{LEFT - 10}" y="{y + 4}" text-anchor="end">{escape(arm["name"])}</text>')
        if arm["interval"] is not None:
            first, last = map(across, arm["interval"])
            parts.append(f'<path class="interval" d="M{first:.1f} {y}H{last:.1f}" stroke="{color}"/>')
        for seed in arm["seeds"]:
            parts.append(f'<circle cx="{across(seed["test_loss"]):.1f}" cy="{y}" r="3.5" fill="{color}" opacity=".7"/>')
        mean = across(arm["test_loss_mean"])
        parts.append(f'<path d="M{mean:.1f} {y - 9}V{y + 9}" stroke="{color}" stroke-width="2.5"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 12}" y="{y + 4}">{arm["test_loss_mean"]:.4f}</text>')
    note = "blue: no validation record was used; green: some were, as the table says"
    parts.append(f'<text x="{LEFT}" y="{bottom + 36}">{note}</text>')
    return _svg("Test loss of each arm", height, parts)


def weights_svg(arms: list[dict[str, Any]]) -> str:
    """A bar for each arm, cut by its weights, means over seeds; of many sources the heaviest are named."""
    names = list(arms[0]["seeds"][0]["weights"])
    means = {arm["name"]: {n: fmean(s["weights"][n] for s in arm["seeds"]) for n in names} for arm in arms}
    heaviest = sorted(names, key=lambda name: -max(row[name] for row in means.values()))[: len(COLORS) - 1]
    shown = [name for name in names if name in heaviest]
    parts, width = [], WIDTH - LEFT - 20
    for index, (arm, row) in enumerate(means.items()):
        y, left = 8 + ROW * index, float(LEFT)
        parts.append(f'<text x="{LEFT - 10}" y="{y + 16}" text-anchor="end">{escape(arm)}</text>')
        for number, name in enumerate(shown):
            wide = row[name] * width
            parts.append(
                f'<rect x="{left:.1f}" y="{y}" width="{wide:.1f}" height="22" fill="{COLORS[number]}">'
                f"<title>{escape(name)} {row[name]:.3f}</title></rect>"
            )
            if wide > 34:
                parts.append(f'<text x="{left + 4:.1f}" y="{y + 15}" style="fill:#fff">{row[name]:.2f}</text>')
            left += wide
    legend, left, y = [], float(LEFT), 8 + ROW * len(means) + 16
    for number, name in enumerate(shown):
        wide = 24 + 7 * min(len(name), 28)
        if left + wide > WIDTH:
            left, y = float(LEFT), y + 18
        legend.append(f'<rect x="{left:.1f}" y="{y - 10}" width="12" height="12" fill="{COLORS[number]}"/>')
        legend.append(f'<text x="{left + 16:.1f}" y="{y}">{escape(name[:28])}</text>')
        left += wide
    if len(shown) < len(names):
        legend.append(f'<text x="{LEFT}" y="{y + 18}">and {len(names) - len(shown)} lighter ones, blank</text>')
        y += 18
    return _svg("Weights of the sources", y + 12, [*parts, *legend])


def _svg(label: str, height: float, parts: list[str]) -> str:
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
        f' aria-label="{label}">{"".join(parts)}</svg>'
    )


def _by_sources(arms: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Arms of the same sources, those of several together; one source has no weights to show."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for arm in arms:
        groups.setdefault(tuple(arm["seeds"][0]["weights"]), []).append(arm)
    return [group for names, group in groups.items() if len(names) > 1]


def _arms_table(arms: list[dict[str, Any]]) -> str:
    rows = []
    for arm in arms:
        seeds = arm["seeds"]
        interval = "" if arm["interval"] is None else "{:.4f} to {:.4f}".format(*arm["interval"])
        flops, tokens, steps, seconds = (fmean(seed[key] for seed in seeds) for key in _COST)
        cells = (f"{arm['test_loss_mean']:.4f}", interval, len(seeds), f"{steps:,.0f}", f"{flops:.3g}")
        cells += (f"{tokens:,.0f}", duration(seconds))
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{escape(arm['name'])}</td>{numbers}<td>{arm['validation']}</td></tr>")
    heads = ("test loss", "95% interval", "seeds", "steps", "FLOPs", "tokens", "time")
    head = "<th>arm</th>" + "".join(f'<th class="number">{text}</th>' for text in heads) + "<th>validation records</th>"
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


_COST = ("flops", "tokens", "steps", "seconds")


def _paired_table(paired: list[dict[str, Any]]) -> str:
    if not paired:
        return "<p>None yet.</p>"
    rows = []
    for row in paired:
        interval, clear = "", ""
        if row["interval"] is not None:
            interval = "{:+.4f} to {:+.4f}".format(*row["interval"])
            clear = "lower" if row["interval"][1] < 0 else "higher" if row["interval"][0] > 0 else "cannot be told"
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in (f"{row['difference_mean']:+.4f}", interval))
        rows.append(f"<tr><td>{row['arm']}</td><td>{row['against']}</td>{numbers}<td>{clear}</td></tr>")
    head = '<th>arm</th><th>against</th><th class="number">difference</th><th class="number">95% interval</th><th></th>'
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"
