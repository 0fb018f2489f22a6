"""The README.md of an exported model."""

import re

import pytest
import yaml

from megatron_scalebio.hf import model_card
from tests.mcore.runs import resolved

NAMES = {"clean": 0.75, "a|b_*c*": 0.25}


def card(*settings: str, role: str = "upper") -> str:
    return model_card(resolved("bilevel.steps=4", *settings), role, 4, NAMES, {"clean": 12, "a|b_*c*": 7})


@pytest.mark.parametrize("role, validated", [("upper", True), ("lower", False)])
def test_it_says_whether_the_model_has_trained_on_the_validation_records(role, validated):
    text = " ".join(card(role=role).split())
    assert f"**{role}** model" in text
    assert ("and on the validation records" in text) == validated
    assert ("no gradient of theirs has reached this model" in text) != validated


def test_of_fixed_weights_it_speaks_of_no_validation():
    text = card("bilevel.mode=fixed")
    assert "by weights that were given" in text and "Validation:" not in text


def test_front_matter_and_table_hold_whatever_a_source_is_called():
    text = card()
    front = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])
    assert front["library_name"] == "transformers"
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    assert [[cell.strip() for cell in row] for row in rows[1:]] == [
        ["clean", "0.7500", "12"],
        [r"a\|b\_\*c\*", "0.2500", "7"],
    ]


def test_no_folder_but_the_models_own_is_named(tmp_path):
    text = model_card(resolved(f"data.validation={tmp_path}/val.jsonl"), "upper", 1, NAMES, dict.fromkeys(NAMES, 1))
    assert str(tmp_path) not in text and "Validation: validation." in text
