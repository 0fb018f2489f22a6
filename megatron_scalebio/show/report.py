"""The run's report for a person: one HTML file that needs no network."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from megatron_scalebio.config import Config, load_config
from megatron_scalebio.resolution import changed_from_preset
from megatron_scalebio.run_folder import RunFolder, replace_file
from megatron_scalebio.show.charts import Line, line_chart
from megatron_scalebio.show.console import duration, interval_head, interval_text, movement, warnings_of
from megatron_scalebio.show.metrics import read_metrics, read_weights

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 800px; margin: 2rem auto; padding: 0 1rem;
       color: #1c1c1c; background: #fff; }
h1 { font-size: 1.4rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p { color: #555; margin: .6rem 0; }
table { border-collapse: collapse; } th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #8884; }
th { text-align: left; font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; margin-top: 1rem; } code { overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { body { color: #eee; background: #16181c; } p { color: #aaa; } }
"""


def write_report(output_dir: str | Path) -> Path:
    """Writes report.html from the run's metrics.jsonl, weights.json and config.yaml, and returns its path."""
    folder = Path(output_dir)
    config = load_config(str(RunFolder(folder).config), [])
    records, weights = read_metrics(folder), read_weights(folder)
    last, name = records[-1], folder.name
    seconds = sum(record.get("step_seconds") or 0.0 for record in records)
    charts = [weights_svg(records), *(svg for svg in (losses_svg(records), gap_svg(records)) if svg)]
    content = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(name)}</title><style>{STYLE}</style></head><body>
<h1>{escape(name)}</h1>
<p>{last["step"]} of {config.bilevel.steps} steps in {duration(seconds)}; mode {config.bilevel.mode},
preset {config.bilevel.preset}. {escape(movement(weights, config))}{_pace(records)}</p>
{"".join(charts)}
<h2>Sources</h2>
{_sources_table(weights)}
{_remarks(records, weights, config)}
<h2>Settings that differ from the preset</h2>
{_settings_table(changed_from_preset(config))}
<p>Configuration <code>{weights["config_sha256"]}</code></p>
</body></html>
"""
    path = RunFolder(folder).report
    replace_file(path, content)
    return path


def _pace(records: list[dict[str, Any]]) -> str:
    """Of all steps as one: totals over total time. Runs of earlier versions have no rates in their records."""
    records = [record for record in records if "tokens_per_second" in record]
    if not records:
        return ""
    seconds = sum(record["step_seconds"] for record in records)
    tokens, flops = (
        sum(record[rate] * record["step_seconds"] for record in records) / seconds
        for rate in ("tokens_per_second", "tflops_per_gpu")
    )
    gib = max(record["peak_memory_bytes"] for record in records) / 2**30
    return f" {tokens:,.0f} tokens/s, {flops:.3g} TFLOP/s per rank, at most {gib:.2f} GiB of memory on a rank."


def weights_svg(records: list[dict[str, Any]], title: str = "Source weights (dashed: uniform)") -> str:
    """The weights over time, as a self-contained SVG."""
    names = list(records[-1]["weights"])
    lines = [Line(name, [(record["step"], record["weights"][name]) for record in records]) for name in names]
    return line_chart(title, lines, reference=1 / len(names), from_zero=True)


def losses_svg(records: list[dict[str, Any]]) -> str | None:
    """Training losses of both models (means over the sources), validation and test loss; None if there is none."""

    def mean(losses: dict[str, float | None] | None) -> float | None:
        known = [loss for loss in (losses or {}).values() if loss is not None]
        return sum(known) / len(known) if known else None

    lines = [
        _line("train, lower", records, lambda record: mean(record.get("train_loss_lower"))),
        _line("train, upper", records, lambda record: mean(record.get("train_loss_upper"))),
        _line("validation", records, lambda record: record.get("val_loss")),
        _line("test", records, lambda record: record.get("test_loss")),
    ]
    for split, key in (("validation", "val_losses"), ("test", "test_losses")):
        names = {name: None for record in records for name in record.get(key) or {}}
        lines += [_line(f"{split} {name}", records, _of_set(key, name)) for name in names]
    lines = [line for line in lines if line.points]
    return line_chart("Losses in nats (training: mean over sources)", lines) if lines else None


def _of_set(key: str, name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda record: record.get(key, {}).get(name)


def gap_svg(records: list[dict[str, Any]]) -> str | None:
    """The penalty gap over time; None where there is none."""
    line = _line("penalty gap", records, lambda record: record.get("penalty_gap"))
    title = "Penalty gap: weighted training loss, upper minus lower (nats)"
    return line_chart(title, [line], reference=0.0, label_format=".1e") if line.points else None


def _line(name: str, records: list[dict[str, Any]], value: Any) -> Line:
    points = [(record["step"], value(record)) for record in records]
    return Line(name, [(step, number) for step, number in points if number is not None])


def _sources_table(weights: dict[str, Any]) -> str:
    """Runs of earlier versions do not say which weights have settled."""
    words = {True: "yes", False: "no", None: ""}
    rows, intervals = [], weights.get("intervals")
    for name, weight in weights["weights"].items():
        settled = words[weights.get("settled", {}).get(name)]
        epochs = f"{weights['epochs'][name]:.2f}" if "epochs" in weights else ""
        mean = f"{weights['weights_mean'][name]:.4f}"
        numbers = (
            weights["num_examples"][name],
            f"{weight:.4f}",
            *interval_text(intervals, name),
            mean,
            settled,
            epochs,
        )
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        rows.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    heads = ("examples", "final weight", *interval_head(intervals), "mean of last quarter", "settled", "epochs")
    head = "<th>source</th>" + "".join(f'<th class="number">{text}</th>' for text in heads)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _remarks(records: list[dict[str, Any]], weights: dict[str, Any], config: Config) -> str:
    """Of runs of earlier versions less is known."""
    lines = warnings_of({"num_duplicates": {}, "overfitting": {}} | weights)
    kept = [(name, share) for name, share in records[-1].get("kept", {}).items() if share < 1]
    for name, share in kept:
        limit = f"data.max_epochs={config.data.max_epochs:g}"
        lines.append(f"{limit} leaves {name} {share:.3g} of the share of its weight; the others take the rest")
    return "".join(f"<p>{escape(line)}.</p>" for line in lines)


def _settings_table(changes: dict[str, tuple[Any, Any]]) -> str:
    if not changes:
        return "<p>None.</p>"
    rows = [
        f"<tr><td>{key}</td><td><code>{escape(str(value))}</code></td><td><code>{escape(str(preset))}</code></td></tr>"
        for key, (preset, value) in changes.items()
    ]
    return f"<table><tr><th>setting</th><th>here</th><th>preset</th></tr>{''.join(rows)}</table>"
