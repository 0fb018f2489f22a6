import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).resolve().parents[2] / "examples/arithmetic.py"
SHARES = {"clean": 0.0, "wrong_025": 0.25, "wrong_050": 0.5, "wrong_075": 0.75, "wrong_100": 1.0}


def generate(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, PROGRAM, folder, *arguments], capture_output=True, text=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_source_has_its_share_of_wrong_answers(tmp_path):
    assert generate(tmp_path).returncode == 0
    files = contents(tmp_path)
    expected = {f"train/{name}.jsonl": (2000, share) for name, share in SHARES.items()}
    expected |= {"val.jsonl": (1000, 0.0), "test.jsonl": (1000, 0.0)}
    assert files.keys() == expected.keys()
    for name, (num_records, share) in expected.items():
        records = [json.loads(line) for line in files[name].splitlines()]
        wrong = [r for r in records if eval_sum(r["prompt"]) != r["response"]]
        assert len(records) == num_records
        # One random answer of a hundred is right by chance.
        assert 0.97 * share * num_records <= len(wrong) <= share * num_records
        assert all(len(r["prompt"]) == 6 and len(r["response"]) == 2 for r in records)
    assert len({r["response"] for r in map(json.loads, files["train/wrong_100.jsonl"].splitlines())}) == 100


def eval_sum(prompt: str) -> str:
    a, b = prompt.rstrip("=").split("+")
    assert int(a) < 50 and int(b) < 50
    return f"{int(a) + int(b):02d}"


def test_one_seed_gives_the_same_bytes_and_another_others(tmp_path):
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert generate(tmp_path / name, "--seed", seed).returncode == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert all(contents(tmp_path / "a")[k] != v for k, v in contents(tmp_path / "c").items())


def test_different_files_are_never_overwritten_and_missing_ones_are_added(tmp_path):
    assert generate(tmp_path).returncode == 0
    before = contents(tmp_path)
    (tmp_path / "val.jsonl").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    assert generate(tmp_path).returncode == 0
    assert contents(tmp_path) == {**before, "notes.txt": b"mine"}
    (tmp_path / "test.jsonl").write_text("mine")
    (tmp_path / "val.jsonl").unlink()
    kept = contents(tmp_path)
    refused = generate(tmp_path)
    assert refused.returncode == 2 and "test.jsonl" in refused.stderr
    assert contents(tmp_path) == kept
