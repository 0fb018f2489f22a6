import numpy as np
import pytest

from megatron_scalebio.config import SourceConfig, UserError
from megatron_scalebio.data.dataset import load_dataset

SHORT = {"prompt": "p", "response": "r"}
LONG = {"prompt": "p" * 10, "response": "r" * 100}
LONG_PROMPT = {"prompt": "p" * 100, "response": "r"}


def test_examples_are_int32_and_the_first_token_never_carries_loss(make_config):
    dataset = load_dataset(make_config({"a": [SHORT], "b": [LONG, {"text": "t"}]}, test=[SHORT]))
    assert dataset.source_names == ["a", "b"]
    assert [[example.source_id for example in source] for source in dataset.train] == [[0], [1, 1]]
    for example in [*dataset.train[0], *dataset.train[1], *dataset.validation, *dataset.test]:
        assert example.tokens.dtype == np.int32 and example.loss_mask.dtype == bool
        assert 2 <= len(example.tokens) == len(example.loss_mask) <= 64 and example.num_positions >= 1
        assert not example.loss_mask[0] and example.num_loss_tokens == example.loss_mask.sum() >= 1


def test_a_truncated_example_has_no_end_of_turn(make_config):
    dataset = load_dataset(make_config({"a": [SHORT, LONG]}))
    short, long = dataset.train[0]
    assert short.tokens[-1] == 256
    assert long.tokens.tolist() == list(("p" * 10 + "\n" + "r" * 53).encode())
    assert (dataset.num_truncated["a"], dataset.num_dropped["a"]) == (1, 0)


def test_an_example_of_exactly_max_length_is_whole(make_config):
    config = make_config({"a": [{"prompt": "p", "response": "r" * 61}, {"prompt": "p", "response": "r" * 62}]})
    exact, over = load_dataset(config).train[0]
    assert (len(exact.tokens), exact.tokens[-1]) == (64, 256)
    assert (len(over.tokens), over.tokens[-1]) == (64, ord("r"))
    config.data.over_length = "drop"
    assert [len(example.tokens) for example in load_dataset(config).train[0]] == [64]


def test_dropped_examples_are_counted(make_config):
    config = make_config({"a": [SHORT, LONG, LONG]})
    config.data.over_length = "drop"
    dataset = load_dataset(config)
    assert (len(dataset.train[0]), dataset.num_dropped["a"], dataset.num_truncated["a"]) == (1, 2, 0)


def test_over_length_error_names_every_line_length_and_limit(make_config):
    config = make_config({"a": [SHORT, LONG, SHORT, LONG]})
    config.data.over_length = "error"
    with pytest.raises(UserError) as caught:
        load_dataset(config)
    for line in (2, 4):
        assert f"a.jsonl:{line}: 112 tokens, more than data.max_length=64" in str(caught.value)


def test_an_example_whose_loss_is_all_cut_away_is_dropped_and_counted(make_config):
    dataset = load_dataset(make_config({"a": [SHORT, LONG_PROMPT]}))
    assert (len(dataset.train[0]), dataset.num_dropped["a"], dataset.num_truncated["a"]) == (1, 1, 0)


@pytest.mark.parametrize("over_length", ["truncate", "drop"])
def test_a_file_with_no_usable_example_is_refused(make_config, over_length):
    config = make_config({"good": [SHORT], "bad": [LONG_PROMPT]})
    config.data.over_length = over_length
    with pytest.raises(UserError, match=r"data.sources\[1\].path \(bad\).*none of the 1 records.*data.max_length=64"):
        load_dataset(config)


@pytest.mark.parametrize("length", [1, 62, 63, 64, 126, 200])
@pytest.mark.parametrize("over_length", ["truncate", "error"])
def test_chunks_of_text_make_each_token_but_the_first_a_target_once(make_config, length, over_length):
    text = "".join(chr(33 + index % 90) for index in range(length))
    config = make_config({"a": [{"text": text}]})
    config.data.over_length = over_length
    chunks = load_dataset(config).train[0]
    targets = [token for chunk in chunks for token in chunk.tokens[chunk.loss_mask]]
    assert chunks[0].tokens[:1].tolist() + targets == [*text.encode(), 256]
    assert all(chunk.loss_mask[1:].all() and len(chunk.tokens) <= 64 for chunk in chunks)
    assert all(len(chunk.tokens) == 64 for chunk in chunks[:-1])


def test_without_response_loss_only_every_token_but_the_first_carries_loss(make_config):
    config = make_config({"a": [SHORT, LONG_PROMPT]})
    config.data.response_loss_only = False
    dataset = load_dataset(config)
    assert len(dataset.train[0]) == 2
    assert all(example.num_loss_tokens == example.num_positions for example in dataset.train[0])


def test_fixed_mode_reads_no_validation_file(make_config):
    config = make_config({"a": [SHORT]})
    config.data.validation = None
    config.bilevel.mode = "fixed"
    assert load_dataset(config).validation == []
    config.data.validation = "missing.jsonl"
    assert load_dataset(config).validation == []


def test_the_fingerprint_changes_with_tokens_masks_names_and_membership(make_config):
    def fingerprint(sources, response_loss_only=True, **files):
        config = make_config(sources, **files)
        config.data.response_loss_only = response_loss_only
        return load_dataset(config).fingerprint

    base = {"a": [SHORT, LONG], "b": [LONG]}
    same = [fingerprint(base), fingerprint(base, test=[LONG])]
    different = [
        fingerprint({"a": [LONG, SHORT], "b": [LONG]}),
        fingerprint({"a": [SHORT], "b": [LONG, LONG]}),
        fingerprint({"a": [SHORT, LONG], "c": [LONG]}),
        fingerprint(base, response_loss_only=False),
        fingerprint(base, validation=[LONG]),
    ]
    assert same[0] == same[1] and len({same[0], *different}) == 6


def test_all_files_that_cannot_be_read_are_named_at_once(make_config, tmp_path):
    config = make_config({"a": [SHORT], "b": []})
    config.data.sources.append(SourceConfig("c", str(tmp_path / "missing.jsonl")))
    config.data.test = str(tmp_path)
    with pytest.raises(UserError) as caught:
        load_dataset(config)
    message = str(caught.value)
    assert "data.sources[1].path (b)" in message and "the file is empty" in message
    assert "data.sources[2].path (c)" in message and "no such file" in message
    assert "data.test" in message and "is a folder" in message and "(a)" not in message


def test_one_file_may_serve_several_sources(make_config):
    config = make_config({"a": [SHORT]})
    config.data.sources.append(SourceConfig("b", config.data.sources[0].path))
    assert [len(source) for source in load_dataset(config).train] == [1, 1]


@pytest.mark.parametrize("tokenizer", ["qwen2", "spm8k/unigram8k.model"])
def test_real_records_become_examples(shared, make_config, tokenizer):
    config = make_config({})
    task = shared / "data/tasks/kinds"
    paths = [*sorted(task.glob("train/*.jsonl")), *sorted((shared / "data/sources").glob("*.jsonl"))]
    for path in paths:
        head = b"".join(path.read_bytes().splitlines(keepends=True)[:40])  # keeps it to seconds
        copy = f"{config.data.validation}.{path.stem}.jsonl"
        with open(copy, "wb") as file:
            file.write(head)
        config.data.sources.append(SourceConfig(path.stem if path.parent == task else str(path), copy))
    config.data.validation, config.data.test = str(task / "val.jsonl"), str(task / "test.jsonl")
    config.data.max_length = 1024
    config.data.tokenizer = str(shared / "tokenizers" / tokenizer)
    dataset = load_dataset(config)
    assert len(dataset.train) == 13 and len(dataset.validation) == len(dataset.test) == 500
    for name, examples in zip(dataset.source_names, dataset.train, strict=True):
        assert len(examples) + dataset.num_dropped[name] == 40 and dataset.num_dropped[name] == 0
        assert max(int(example.tokens.max()) for example in examples) < dataset.tokenizer.vocab_size


def test_exact_duplicates_are_counted_within_a_source_alone(make_config):
    same, other = {"prompt": "1+1", "response": "2"}, {"prompt": "1+1", "response": "3"}
    config = make_config({"a": [same, other, same, same], "b": [same], "c": [other, {**other, "id": 7}]})
    dataset = load_dataset(config)
    assert dataset.num_duplicates == {"a": 2, "b": 0, "c": 1} and dataset.num_examples == {"a": 4, "b": 1, "c": 2}


SETS = [{"name": "math", "weight": 3}, {"name": "chat"}]


def with_sets(config, write):
    paths = [write(f"{each['name']}.jsonl", records) for each, records in zip(SETS, RECORDS_OF_SETS, strict=True)]
    config.data.validation = [{**each, "path": path} for each, path in zip(SETS, paths, strict=True)]
    return config


RECORDS_OF_SETS = [{"prompt": f"m{n}", "response": "m" * (1 + n)} for n in range(3)], [{"prompt": "c", "response": "c"}]


def test_several_validation_sets_keep_their_number_and_tell_the_data_apart(make_config, write):
    config = make_config({"a": [{"prompt": "1", "response": "2"}]})
    one = load_dataset(config)
    dataset = load_dataset(with_sets(config, write))
    assert [example.source_id for example in dataset.validation] == [0, 0, 0, 1]
    config.data.validation[1], config.data.validation[0] = config.data.validation
    assert len({one.fingerprint, dataset.fingerprint, load_dataset(config).fingerprint}) == 3
    config.data.validation[0]["path"] += ".absent"
    with pytest.raises(UserError, match=r"data.validation\[0\].path \(chat\): .*absent"):
        load_dataset(config)
