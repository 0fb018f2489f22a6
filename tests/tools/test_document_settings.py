"""docs/settings.md is what the declarations say."""

from pathlib import Path

from megatron_scalebio.config import SETTINGS
from tools.document_settings import document

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
CURE = "python tools/document_settings.py > docs/settings.md"


def test_the_page_is_current():
    assert PAGE.read_text() == document(), f"docs/settings.md is not what the settings declare: run `{CURE}`"
    assert CURE in PAGE.read_text()


def test_every_setting_has_its_row():
    rows = [line.split("`")[1] for line in document().splitlines() if line.startswith("| `")]
    assert sorted(rows) == sorted(SETTINGS)


def test_a_row_says_default_presets_choices_and_range():
    rows = {line.split("`")[1]: line for line in document().splitlines() if line.startswith("| `")}
    assert "| `adaptive`; paper: `natural` | `stratified`, `natural`, `adaptive` |" in rows["data.sampling"]
    assert "| `null` | at least 1, or null |" in rows["bilevel.validation_batch_size"]
    assert all(f"`{family}`" in rows["model.family"].split("|")[3] for family in ("qwen2", "llama3", "gemma2"))
    assert "| `1.0`; paper: `100.0` | positive and finite |" in rows["bilevel.penalty_alpha"]
