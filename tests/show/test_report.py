"""The report is one file that stands alone and says what the run's files say."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megatron_scalebio.show.charts import BOTTOM, HEIGHT, LABEL_HEIGHT, LEFT, RIGHT, WIDTH, Line, line_chart, ticks
from megatron_scalebio.show.report import write_report
from megatron_scalebio.show.writers import MetricsWriter
from tests.configs import resolved
from tests.show.records import a_record

REPOSITORY = Path(__file__).parents[2]
NAMES = ("clean", "a <b> & 'c'", "noisy")


NO_LOSSES = {"train_loss_lower": {}, "train_loss_upper": {}, "val_loss": None, "penalty_gap": None}


def a_run(folder: Path, steps: int, **record) -> Path:
    config = resolved(f"run.output_dir={folder}", "optimizer.lr=0.125", f"bilevel.steps={steps}")
    with MetricsWriter(
        config, dict.fromkeys(NAMES, 1234), dict.fromkeys(NAMES, 0), start_step=0, is_main_rank=True
    ) as metrics:
        for step in range(1, steps + 1):
            weights = dict(zip(NAMES, (0.2 + 0.01 * step, 0.3, 0.5 - 0.01 * step), strict=True))
            metrics.record(a_record(step, weights=weights, logits=weights, **(NO_LOSSES | record)))
    return folder


LOSSES = {
    "train_loss_lower": dict.fromkeys(NAMES, 2.0),
    "train_loss_upper": {NAMES[0]: 1.0, NAMES[1]: None, NAMES[2]: 2.0},
    "val_loss": 1.25,
    "penalty_gap": -1e-3,
}


def test_report_needs_nothing_but_itself(tmp_path):
    html = write_report(str(a_run(tmp_path, 12, **LOSSES))).read_text()
    addresses = set(re.findall(r"https?://[^\"' <]+", html))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not re.search(r"<(script|link|img|iframe)\b|@import|url\(", html)


def test_report_shows_every_source_weight_and_changed_setting(tmp_path):
    folder = a_run(tmp_path, 20, **LOSSES, num_examples={"noisy": 6})
    html = write_report(str(folder)).read_text()
    weights = json.loads((folder / "weights.json").read_text())
    for name, shown in zip(NAMES, ("clean", "a &lt;b&gt; &amp; &#x27;c&#x27;", "noisy"), strict=True):
        row = re.search(f"<tr><td>{re.escape(shown)}</td>(.*?)</tr>", html)[1]
        numbers = re.findall(r">([^<]+)</td>", row)
        settled = "yes" if name == NAMES[1] else "no"
        expected = [f"{weights['weights'][name]:.4f}", f"{weights['weights_mean'][name]:.4f}", settled]
        expected.append("0.10" if name == "noisy" else "0.00")  # 6 of 1,234 examples in each of 20 steps
        assert numbers == ["1234", *expected]
    assert "<td>optimizer.lr</td><td><code>0.125</code></td><td><code>2e-06</code></td>" in html
    assert weights["config_sha256"] in html
    assert html.count("<svg") == 3


def test_report_of_a_fixed_run_leaves_out_what_it_has_not(tmp_path):
    html = write_report(str(a_run(tmp_path, 3))).read_text()
    assert html.count("<svg") == 1


def test_report_of_a_run_that_does_not_say_what_has_settled_can_be_written(tmp_path):
    folder = a_run(tmp_path, 20, **LOSSES)
    weights = json.loads((folder / "weights.json").read_text())
    for key in ("settled", "moved", "intervals", "epochs"):
        del weights[key]
    (folder / "weights.json").write_text(json.dumps(weights))
    assert "Some weights were still moving at the end" in write_report(str(folder)).read_text()


def test_report_of_one_step_can_be_written(tmp_path):
    assert write_report(str(a_run(tmp_path, 1, **LOSSES))).read_text().count("<circle") > 0


def svg_of(lines: list[Line], **keywords) -> ElementTree.Element:
    return ElementTree.fromstring(line_chart("A chart & more", lines, **keywords))


def coordinates(svg: ElementTree.Element) -> list[list[tuple[float, float]]]:
    paths = [item.get("d") for item in svg if item.get("class") == "line" and "L" in item.get("d")]
    return [[tuple(map(float, point.split())) for point in path[1:].split("L")] for path in paths]


def test_lines_stay_in_the_plot_and_keep_their_order():
    lines = [Line(f"line {k}", [(step, k * step / 7) for step in range(1, 40)]) for k in range(-3, 4)]
    drawn = coordinates(svg_of(lines, reference=0.0))
    assert len(drawn) == 7
    assert all(LEFT <= x <= WIDTH - RIGHT + 0.1 and 0 <= y <= HEIGHT - BOTTOM + 0.1 for line in drawn for x, y in line)
    ends = [line[-1][1] for line in drawn]
    assert ends == sorted(ends, reverse=True)  # a larger value stands higher: its y is smaller


def test_long_lines_are_thinned_to_their_end():
    points = [(step, float(step)) for step in range(1, 10_001)]
    (drawn,) = coordinates(svg_of([Line("long", points)]))
    assert len(drawn) <= 500 and drawn[-1] == coordinates(svg_of([Line("long", points[:1] + points[-1:])]))[0][-1]


@pytest.mark.parametrize("num_lines", [2, 12, 60])
@pytest.mark.parametrize("height", [0.0, 0.5, 1.0])
def test_labels_at_the_ends_do_not_overlap(num_lines, height):
    lines = [Line(f"source {k}", [(1, k % 2), (2, height + k * 1e-6)]) for k in range(num_lines)]
    texts = [item for item in svg_of(lines) if item.tag.endswith("text") and float(item.get("x")) > WIDTH - RIGHT]
    rows = sorted(float(text.get("y")) for text in texts)
    assert len(rows) >= min(num_lines, 12)
    assert all(low - high >= LABEL_HEIGHT - 0.2 for high, low in zip(rows, rows[1:], strict=False))
    assert 0 < rows[0] and rows[-1] <= HEIGHT - BOTTOM + 5


@pytest.mark.parametrize("low, high", [(0, 1), (0.31, 0.32), (-3e-7, 9e-7), (1, 1), (0, 12345)])
def test_ticks_enclose_the_range_and_are_few(low, high):
    found = ticks(low, high)
    assert found[0] <= low + 1e-12 and found[-1] >= high - 1e-12 and 3 <= len(found) <= 12


@pytest.mark.parametrize("first, last", [(1, 2), (1, 400), (3, 3), (1, 7)])
def test_ticks_of_steps_are_whole_and_inside(first, last):
    found = ticks(first, last, whole=True)
    assert found and all(tick == int(tick) and first <= tick <= max(last, first + 1) for tick in found)


def test_plot_weights_writes_a_picture(tmp_path):
    a_run(tmp_path / "run", 4)
    command = [sys.executable, REPOSITORY / "tools" / "plot_weights.py", tmp_path / "run", tmp_path / "weights.svg"]
    subprocess.run(command, check=True)
    assert ElementTree.parse(tmp_path / "weights.svg").getroot().tag.endswith("svg")
