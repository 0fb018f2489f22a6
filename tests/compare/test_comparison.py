"""What a comparison runs, with which share of the budget, what it keeps, and what it refuses. No model is trained but
in the last test: runs write what a formula says."""

import json
from pathlib import Path

import pytest

from megatron_scalebio.cli import main
from megatron_scalebio.compare import ARMS, compare
from megatron_scalebio.compare import runs as runs_module
from megatron_scalebio.config import UserError, load_config
from megatron_scalebio.run import open_run
from megatron_scalebio.run_folder import RunFolder
from tests.show.records import a_record
from tools.benchmarks.tasks import make_arithmetic

SOURCES = ("clean", "wrong_050", "wrong_100")
LOSS = {"uniform": 1.0, "natural": 0.98, "learned": 0.5, "validation": 0.6, "random": 0.7}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_arithmetic(folder, seed=1)
    clean = folder / "train/clean.jsonl"
    clean.write_text("".join(clean.read_text().splitlines(keepends=True)[:500]))
    sources = "".join(f"    - {{name: {name}, path: train/{name}.jsonl}}\n" for name in SOURCES)
    (folder / "mine.yaml").write_text(
        "model:\n"
        "  shape: {num_layers: 2, hidden_size: 16, ffn_hidden_size: 32, num_attention_heads: 2, num_query_groups: 1}\n"
        f"data:\n  tokenizer: bytes\n  template: plain\n  sources:\n{sources}"
        "  validation: val.jsonl\n  test: test.jsonl\n  max_length: 64\n  micro_batch_size: 4\n"
        "bilevel: {steps: 12, global_batch_size: 12}\n"
        "lisa: {num_active_layers: 1, period: 4}\n"
        "precision: {compute: fp32}\nrun: {device: cpu}\n"
    )
    return folder / "mine.yaml"


@pytest.fixture
def trained(monkeypatch) -> list[Path]:
    """Configurations that were run; each run ends as its arm's loss says, a bit lower with every seed."""
    done: list[Path] = []

    def train(self, config_file: Path, log: Path, terms) -> None:
        done.append(config_file)
        config = load_config(str(config_file), [])
        folder = RunFolder(Path(config.run.output_dir))
        arm, loss = config_file.parts[-3], 2.0
        loss = LOSS.get(arm, 1.5) - 0.01 * config.run.seed
        if "mixture" in config_file.name:
            loss = abs(dict(config.bilevel.weights)["clean"] - 0.5)
        names = [source.name for source in config.data.sources]
        weights = config.bilevel.weights or dict.fromkeys(names, 1 / len(names))
        if config.bilevel.mode == "bilevel":
            weights = dict(zip(names, (0.8, 0.15, 0.05), strict=True))
        steps = config.bilevel.steps
        last = {"test_loss": loss, "test_loss_lower": loss + 1} if steps else {}
        flops = 1.1 * runs_module.flops_of_step(open_run(config, writes=False), 1)  # dearer than was estimated
        records = [a_record(step, weights=weights, flops=flops) for step in range(1, steps)]
        records.append(a_record(steps, weights=weights, flops=flops, **last))
        folder.path.mkdir(parents=True)
        folder.metrics.write_text("".join(json.dumps(record.to_dict()) + "\n" for record in records))
        folder.weights.write_text(json.dumps({"weights": weights}))

    monkeypatch.setattr(runs_module.Processes, "train", train)
    return done


def compared(file: Path, out: Path, arms, seeds: int = 2, **options) -> dict:
    overrides = [f"run.output_dir={out}", *options.pop("overrides", [])]
    assert compare(str(file), overrides, arms=arms, seeds=seeds, **options) == 0
    return json.loads((out / "compare.json").read_text())


def test_every_arm_spends_the_budget_and_learning_is_paid_from_it(file, tmp_path, trained):
    content = compared(file, tmp_path / "c", None, seeds=1, learning_share=0.25, mixtures=3)
    cost = {}
    for config_file in trained:
        config = load_config(str(config_file), [])
        run = open_run(config, writes=False)
        cost[config_file.parts[-3], config_file.stem] = runs_module.flops_of_step(run, 1) * config.bilevel.steps
    assert {arm for arm, _ in cost} == set(ARMS) - {"given"}
    budget = content["budget_flops"]
    for arm in set(ARMS) - {"given"}:
        spent = sum(flops for (of, _), flops in cost.items() if of == arm)
        runs = sum(of == arm for of, _ in cost)
        assert budget * (1 - 0.2 * runs) < spent <= budget  # each run leaves over less than a step
    assert cost["learned", "learn"] <= 0.25 * budget
    arms = {arm["name"]: arm for arm in content["arms"]}
    both = [arms[name]["seeds"][0]["test_loss"] for name in ("one_stage_upper", "one_stage_lower")]
    assert both[1] == both[0] + 1
    assert not arms["uniform"]["sees_validation"] and arms["learned"]["sees_validation"]
    spent = cost["learned", "learn"], cost["learned", "train"]
    assert arms["learned"]["seeds"][0]["flops"] == pytest.approx(1.1 * sum(spent))  # what was executed, of both
    assert spent[1] <= budget - 1.1 * spent[0] < spent[1] + 0.1 * budget  # the rest is what the first has left


def test_weights_go_where_they_belong(file, tmp_path, trained):
    compared(file, tmp_path / "c", ["natural", "learned", "random", "validation", "validation_added"], seeds=1)
    configs = {(path.parts[-3], path.stem): load_config(str(path), []) for path in trained}
    assert configs["natural", "train"].bilevel.weights == pytest.approx(
        {"clean": 500 / 4500, "wrong_050": 2000 / 4500, "wrong_100": 2000 / 4500}
    )
    assert configs["learned", "train"].bilevel.weights == {"clean": 0.8, "wrong_050": 0.15, "wrong_100": 0.05}
    tries = [config for (arm, name), config in configs.items() if name.startswith("mixture")]
    assert len(tries) == 8 and all(config.data.test == config.data.validation for config in tries)
    best = min(tries, key=lambda config: abs(config.bilevel.weights["clean"] - 0.5))
    assert configs["random", "train"].bilevel.weights == best.bilevel.weights
    assert configs["random", "train"].data.test != configs["random", "train"].data.validation
    assert [source.name for source in configs["validation", "train"].data.sources] == ["validation"]
    assert [source.name for source in configs["validation_added", "train"].data.sources] == [*SOURCES, "validation"]
    assert all(config.data.sampling == "adaptive" for config in configs.values() if config.bilevel.mode == "fixed")


def test_given_weights_may_be_zero_and_are_not_where_learning_starts(file, tmp_path, trained):
    given = ["bilevel.weights={clean: 1, wrong_050: 0, wrong_100: 0}"]
    compared(file, tmp_path / "c", ["given", "one_stage"], seeds=1, overrides=given)
    configs = {path.parts[-3]: load_config(str(path), []) for path in trained}
    assert configs["given"].bilevel.weights == {"clean": 1, "wrong_050": 0, "wrong_100": 0}
    assert configs["one_stage"].bilevel.weights is None


def test_what_is_finished_is_not_run_again_and_arms_and_seeds_are_added(file, tmp_path, trained):
    out = tmp_path / "c"
    first = compared(file, out, ["uniform"], seeds=1)
    assert len(trained) == 1
    content = compared(file, out, ["uniform", "validation"], seeds=3)
    assert len(trained) == 6
    assert [arm["name"] for arm in content["arms"]] == ["validation", "uniform"]
    assert content["arms"][1]["seeds"][0] == first["arms"][0]["seeds"][0]
    (row,) = content["paired"]
    assert (row["arm"], row["against"]) == ("validation", "uniform")
    assert row["difference_mean"] == pytest.approx(-0.4) and row["interval"] == pytest.approx([-0.4, -0.4])
    (out / "compare.json").unlink()
    with pytest.raises(UserError, match=r"holds compare.html, runs and no compare.json"):
        compared(file, out, ["uniform"])


def test_a_comparison_is_of_its_data_and_an_arm_with_given_weights_may_be_added(file, tmp_path, trained):
    out, given = tmp_path / "c", "bilevel.weights={clean: 1, wrong_050: 0, wrong_100: 0}"
    compared(file, out, ["uniform"], seeds=1)
    compared(file, out, ["uniform", "given"], seeds=1, overrides=[given])
    assert len(trained) == 2
    compared(file, out, ["uniform"], seeds=1)
    with pytest.raises(UserError, match="given_weights: {'clean': 1"):
        compared(file, out, ["given"], overrides=[given.replace("clean: 1", "clean: 2")])
    for key, words in (("data.test", "test_fingerprint: "), ("data.validation", "dataset_fingerprint: ")):
        path = Path(getattr(load_config(str(file), []).data, key.removeprefix("data.")))
        content = path.read_text()
        path.write_text("".join(content.splitlines(keepends=True)[1:]))
        with pytest.raises(UserError, match=words):
            compared(file, out, ["uniform"], seeds=1)
        path.write_text(content)
    assert len(trained) == 2


def test_the_order_is_over_the_seeds_that_all_arms_have(file, tmp_path, trained):
    """Seeds are lower one after another: the arm that has more of them is not the better one for that."""
    compared(file, tmp_path / "c", ["uniform"], seeds=8)
    content = compared(file, tmp_path / "c", ["natural"], seeds=2)
    assert [arm["name"] for arm in content["arms"]] == ["natural", "uniform"]
    assert content["arms"][1]["test_loss_mean"] < content["arms"][0]["test_loss_mean"]


def test_the_limit_of_repetition_is_checked_with_each_runs_own_steps(file, tmp_path, trained):
    limit = ["data.max_epochs=0.05", "bilevel.steps=1000"]
    compared(file, tmp_path / "c", ["uniform"], seeds=1, steps=4, overrides=limit)
    assert load_config(str(trained[0]), []).data.max_epochs == 0.05
    with pytest.raises(UserError, match="data.max_epochs=0.05 allows 225 draws"):
        compared(file, tmp_path / "d", ["uniform"], seeds=1, overrides=limit)


def test_an_arm_is_trained_without_the_runs_own_stop_export_and_profile(file, tmp_path, trained):
    own = ["run.stop=settled", "run.export_model=lower", "run.profile={steps: [1, 12]}", "run.save_every=5"]
    compared(file, tmp_path / "c", ["uniform", "learned"], seeds=1, overrides=own)
    for path in trained:
        run = load_config(str(path), []).run
        assert (run.stop, run.export_model, run.profile) == ("steps", "upper", None)
        assert not run.export and not run.save_last


def test_the_page_says_what_to_do_and_needs_no_network(file, tmp_path, trained):
    compared(file, tmp_path / "c", ["uniform", "learned", "validation"], seeds=3)
    page = (tmp_path / "c" / "compare.html").read_text()
    assert "Learn the weights and train a fresh model with them: its test loss is lower than" in page
    assert "Not at equal cost: executed FLOPs beside the budget, " in page and "uniform +" in page
    assert page.count("<circle") == 9 and "chooses weights by it" in page and "trains on it" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(arms=["learnt"]), "--arms learnt: there are uniform, natural"),
        (dict(arms=["uniform", "uniform"]), "names an arm twice"),
        (dict(arms=["given"]), "--arms given: bilevel.weights is not set"),
        (dict(arms=["uniform"], seeds=0), "--seeds 0: must be at least 1"),
        (dict(arms=["uniform"], budget_flops=-1.0), "--budget -1.0: must be positive"),
        (dict(arms=["uniform"], budget_flops=1e9, steps=3), "give one of them"),
        (dict(arms=["learned"], learning_share=1.0), "--learning-share 1.0: must lie between 0 and 1"),
        (dict(arms=["uniform"], budget_flops=10.0), "buys no step of run 'train', which takes"),
        (dict(arms=["uniform"], overrides=["data.test=null"]), "data.test is not set"),
        (dict(arms=["uniform"], overrides=["data.exploration=1.5"]), "data.exploration=1.5: must be a share"),
    ],
)
def test_mistakes_are_refused_before_anything_is_run(file, tmp_path, trained, options, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        compared(file, tmp_path / "c", **options)
    assert trained == [] and not (tmp_path / "c").exists()


def test_a_folder_of_another_comparison_is_refused_with_what_differs(file, tmp_path, trained):
    compared(file, tmp_path / "c", ["uniform"], seeds=1, steps=12)
    for options, words in [
        (dict(steps=13), "budget_flops: "),
        (dict(steps=12, overrides=["optimizer.lr=1e-4"]), "config_sha256: "),
        (dict(steps=12, learning_share=0.3), "learning_share: 0.5 there, 0.3 here"),
    ]:
        with pytest.raises(UserError, match="holds another comparison") as error:
            compared(file, tmp_path / "c", ["uniform"], **options)
        assert words in str(error.value)
    (tmp_path / "c" / "compare.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        compared(file, tmp_path / "c", ["uniform"], steps=12)


def test_the_command_trains_and_compares(file, tmp_path, capfd):
    out = tmp_path / "c"
    status = main(
        [
            "compare",
            "--config",
            str(file),
            "--arms",
            "uniform,learned",
            "--seeds",
            "1",
            "--steps",
            "4",
            "--at-once",
            "2",
        ]
        + [f"run.output_dir={out}"]
    )
    assert status == 0
    content = json.loads((out / "compare.json").read_text())
    for arm in content["arms"]:
        (seed,) = arm["seeds"]
        assert 0.7 * content["budget_flops"] < seed["flops"] <= 1.05 * content["budget_flops"]
        assert sum(seed["weights"].values()) == pytest.approx(1)
    assert "one seed says nothing" in capfd.readouterr().out
    assert main(["compare", "--config", str(file), "--arms", "nothing"]) == 2
    assert "error: --arms nothing: there are" in capfd.readouterr().err
