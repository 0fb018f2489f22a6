import json
from collections import Counter

import pytest
import torch

from megatron_scalebio.config import Config
from megatron_scalebio.data import Dataset, Sampler, load_dataset
from megatron_scalebio.resolution import resolve
from tests.configs import BYTES

SIZES = {"a": 5, "b": 7, "c": 12}


def sampler_of(dataset: Dataset, config: Config, rank: int, size: int) -> Sampler:
    return Sampler(dataset, resolve(config, BYTES), rank, size)


def records(name: str, count: int) -> list[dict]:
    """Records that differ, of uneven lengths."""
    return [{"prompt": f"{name}{i}" + "." * (i % 5), "response": "r" * (1 + i % 7)} for i in range(count)]


@pytest.fixture
def config(make_config):
    sources = {name: records(name, size) for name, size in SIZES.items()}
    config = make_config(sources, records("v", 9), records("t", 11))
    config.bilevel.global_batch_size, config.data.sampling = 8, "stratified"
    config.bilevel.validation_batch_size = 4
    return config


def examples_of(microbatches) -> Counter:
    """The examples in the tensors: (source, input tokens, targets that carry loss), padding left out."""
    found = Counter()
    for batch in microbatches:
        ends = batch.cu_seqlens.tolist()
        for start, end in zip(ends, ends[1:], strict=False):
            here = (batch.loss_positions >= start) & (batch.loss_positions < end)
            if here.any():
                source = set(batch.source_ids[here].tolist())
                assert len(source) == 1 and set(batch.example_loss_tokens[here].tolist()) == {int(here.sum())}
                found[source.pop(), tuple(batch.tokens[start:end].tolist()), tuple(batch.targets[here].tolist())] += 1
            else:
                assert set(batch.tokens[start:end].tolist()) == {257}
    return found


def epoch_of(examples) -> Counter:
    return Counter(
        (e.source_id, tuple(e.tokens[:-1].tolist()), tuple(e.tokens[e.loss_mask].tolist())) for e in examples
    )


def equal(first, second) -> bool:
    return all(
        all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("tokens", "cu_seqlens", "loss_positions", "targets"))
        for a, b in zip(first.train + first.validation, second.train + second.validation, strict=True)
    )


@pytest.mark.parametrize("sampling", ["stratified", "natural"])
def test_random_access_equals_reading_in_order(config, sampling):
    config.data.sampling = sampling
    dataset = load_dataset(config)
    sampler = sampler_of(dataset, config, 0, 1)
    in_order = [sampler.step(step) for step in range(1, 31)]
    for step in (30, 2, 17, 1):
        fresh = sampler_of(load_dataset(config), config, 0, 1).step(step)
        assert equal(fresh, in_order[step - 1]) and equal(sampler.step(step), fresh)
        assert fresh.num_examples == in_order[step - 1].num_examples
    assert not equal(in_order[0], in_order[1])


@pytest.mark.parametrize("batch_size", [3, 4, 8, 9, 11])
def test_stratified_shares_are_equal_over_k_steps_and_within_one_always(config, batch_size):
    config.bilevel.global_batch_size = batch_size
    sampler = sampler_of(load_dataset(config), config, 0, 1)
    for first in (1, 2, 1000):
        batches = [sampler.step(step).num_examples for step in range(first, first + 3)]
        assert [sum(counts) for counts in zip(*batches, strict=True)] == [batch_size] * 3
        assert all(sum(counts) == batch_size and max(counts) - min(counts) <= 1 for counts in batches)


def test_stratified_sees_each_example_of_a_source_once_per_epoch(config):
    config.bilevel.global_batch_size = 3  # one example of each source per step
    dataset = load_dataset(config)
    sampler = sampler_of(dataset, config, 0, 1)
    for source, examples in enumerate(dataset.train):
        size = len(examples)
        orders = []
        for epoch in range(3):
            steps = [examples_of(sampler.step(epoch * size + i + 1).train) for i in range(size)]
            orders.append([next(key for key in step if key[0] == source) for step in steps])
            assert Counter(orders[-1]) == epoch_of(examples)
        assert orders[0] != orders[1] or orders[1] != orders[2]


def test_natural_sees_each_example_once_per_epoch(config):
    config.data.sampling = "natural"
    dataset = load_dataset(config)
    sampler = sampler_of(dataset, config, 0, 1)
    for first in (1, 4):  # 24 examples in 3 steps of 8
        seen = sum((examples_of(sampler.step(step).train) for step in range(first, first + 3)), Counter())
        assert seen == epoch_of(example for source in dataset.train for example in source)


def test_validation_goes_through_its_own_epochs_and_wraps(config):
    dataset = load_dataset(config)
    sampler = sampler_of(dataset, config, 0, 1)
    seen = sum((examples_of(sampler.step(step).validation) for step in range(1, 10)), Counter())
    assert seen == Counter({key: 4 for key in epoch_of(dataset.validation)})  # 9 steps of 4 of 9 examples
    config.bilevel.validation_batch_size = 20  # more than the file holds
    batch = sampler_of(dataset, config, 0, 1).step(1)
    assert sum(examples_of(batch.validation).values()) == sum(batch.num_validation_examples) == 20
    assert set(examples_of(batch.validation).values()) == {2, 3}
    config.bilevel.validation_batch_size = None
    assert sampler_of(dataset, config, 0, 1).step(1).num_validation_examples == [config.bilevel.global_batch_size]


@pytest.mark.parametrize("packing, micro_batch_size, size", [(True, 1, 2), (True, 2, 3), (False, 1, 1), (False, 3, 4)])
def test_every_layout_sees_the_same_global_batch_and_counts(config, packing, micro_batch_size, size):
    dataset = load_dataset(config)
    reference = sampler_of(dataset, config, 0, 1).step(5)
    config.data.packing, config.data.micro_batch_size = packing, micro_batch_size
    shares = [sampler_of(dataset, config, rank, size).step(5) for rank in range(size)]
    for role in ("train", "validation"):
        assert sum((examples_of(getattr(share, role)) for share in shares), Counter()) == examples_of(
            getattr(reference, role)
        )
        assert len({len(getattr(share, role)) for share in shares}) == 1
    for name in ("num_examples", "num_loss_tokens", "num_validation_examples", "num_validation_loss_tokens"):
        assert all(getattr(share, name) == getattr(reference, name) for share in shares)
    assert all(share.num_tokens == reference.num_tokens for share in shares)


def test_counts_are_those_of_the_tensors(config):
    batch = sampler_of(load_dataset(config), config, 0, 1).step(3)
    train, validation = examples_of(batch.train), examples_of(batch.validation)
    for source in range(3):
        of_source = {key: times for key, times in train.items() if key[0] == source}
        assert batch.num_examples[source] == sum(of_source.values())
        assert batch.num_loss_tokens[source] == sum(len(key[2]) * times for key, times in of_source.items())
    assert batch.num_validation_examples == [sum(validation.values())]
    assert batch.num_validation_loss_tokens == [sum(len(key[2]) * times for key, times in validation.items())]
    assert batch.num_tokens == sum(len(key[1]) * times for part in (train, validation) for key, times in part.items())


def test_a_late_step_needs_no_replay(config):
    config.bilevel.global_batch_size = 4
    sampler = sampler_of(load_dataset(config), config, 0, 1)
    assert sum(sampler.step(10**15).num_examples) == 4


def test_the_draw_depends_on_the_seed_and_a_sources_name_not_its_place(config):
    def draws(sources, seed):
        config.data.sources, config.run.seed, config.bilevel.global_batch_size = sources, seed, 3
        dataset = load_dataset(config)
        sampler = sampler_of(dataset, config, 0, 1)
        steps = [examples_of(sampler.step(step).train) for step in range(1, 6)]
        return [{dataset.source_names[key[0]]: key[1:] for key in step} for step in steps]

    sources = list(config.data.sources)
    assert draws(sources, 1) == draws(sources[::-1], 1)
    assert draws(sources, 1) != draws(sources, 2)


def test_sources_of_one_file_draw_in_different_orders(config):
    config.data.sources[1].path = config.data.sources[2].path
    config.bilevel.global_batch_size = 3
    sampler = sampler_of(load_dataset(config), config, 0, 1)
    orders = {1: [], 2: []}
    for step in range(1, 13):
        for source_id, *content in examples_of(sampler.step(step).train):
            orders.setdefault(source_id, []).append(content)
    assert orders[1] != orders[2] and sorted(orders[1]) == sorted(orders[2])


def test_the_draw_is_the_same_on_every_machine(config):
    """Fixed by sha256 and PCG64's raw stream: a change of these bytes breaks every resumed run."""
    config.data.sampling = "natural"
    batch = sampler_of(load_dataset(config), config, 0, 1).step(2)
    prompts = sorted(bytes(tokens).split(b"\n")[0].decode().rstrip(".") for _, tokens, _ in examples_of(batch.train))
    assert " ".join(prompts) == "a1 a4 b4 c1 c10 c2 c4 c5"


def test_adaptive_batches_hold_the_shares_and_read_each_source_epoch_by_epoch(config):
    config.data.sampling, config.data.exploration = "adaptive", 0.3
    dataset = load_dataset(config)
    sampler, second = (sampler_of(dataset, config, rank, 2) for rank in range(2))
    seen = [Counter() for _ in range(3)]
    for step in range(1, 22):
        weights = [0.7, 0.2, 0.1] if step % 2 else [0.1, 0.1, 0.8]
        shares = [each.step(step, weights) for each in (sampler, second)]
        drawn = sum((examples_of(share.train) for share in shares), Counter())
        assert shares[0].num_examples == shares[1].num_examples
        for source in range(3):
            of_source = Counter({key: times for key, times in drawn.items() if key[0] == source})
            assert sum(of_source.values()) == shares[0].num_examples[source] >= 1
            seen[source] += of_source
    for source, examples in enumerate(dataset.train):  # whole epochs, and the one that is begun
        times = set(seen[source].values())
        assert set(seen[source]) == set(epoch_of(examples)) and max(times) - min(times) <= 1


def test_adaptive_draws_go_in_order_and_continue_from_their_state(config):
    config.data.sampling = "adaptive"
    dataset = load_dataset(config)
    sampler = sampler_of(dataset, config, 0, 1)
    weights = [[0.1 * step, 0.2, 0.8 - 0.1 * step] for step in range(1, 7)]
    expected = [sampler.step(step, weights[step - 1]) for step in range(1, 4)]
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = [sampler.step(step, weights[step - 1]) for step in range(4, 7)]
    resumed = sampler_of(dataset, config, 0, 1)
    with pytest.raises(ValueError, match="step 4 follows 0 batches"):
        resumed.step(4, weights[3])
    resumed.load_state_dict(state)
    for step, batch in zip(range(4, 7), expected, strict=True):
        assert equal(resumed.step(step, weights[step - 1]), batch)


def test_in_fixed_mode_an_adaptive_batch_is_drawn_by_the_weights_alone(config):
    config.data.sampling, config.bilevel.mode = "adaptive", "fixed"
    sampler = sampler_of(load_dataset(config), config, 0, 1)
    batches = [sampler.step(step, [0.75, 0.25, 0.0]) for step in range(1, 5)]
    assert [batch.num_examples for batch in batches] == [[6, 2, 0]] * 4  # of 8; weight 0 costs nothing
    assert all(batch.scale == [1.0, 1.0, 1.0] for batch in batches)


def test_test_batches_hold_each_test_example_once(config):
    dataset = load_dataset(config)
    shares = [sampler_of(dataset, config, rank, 3).test_batch() for rank in range(3)]
    assert sum((examples_of(microbatches) for microbatches, _ in shares), Counter()) == epoch_of(dataset.test)
    counts = [len(dataset.test)], [sum(example.num_loss_tokens for example in dataset.test)]
    assert all(found == counts for _, found in shares)
    assert len({len(microbatches) for microbatches, _ in shares}) == 1
    dataset.test, config.data.test = [], None
    assert sampler_of(dataset, config, 0, 1).test_batch() == ([], ([], []))


def test_fixed_mode_has_no_validation(config):
    config.bilevel.mode = "fixed"
    batch = sampler_of(load_dataset(config), config, 0, 1).step(1)
    assert (batch.validation, batch.num_validation_examples, batch.num_validation_loss_tokens) == ([], [], [])


def test_a_dataset_made_in_memory_has_one_set_of_each_kind_without_a_setting(config):
    dataset = load_dataset(config)
    config.data.validation = config.data.test = None
    sampler = sampler_of(dataset, config, 0, 1)
    step = sampler.step(1)
    assert step.validation_weights == sampler.test_weights == [1.0]
    assert step.num_validation_examples == [config.bilevel.validation_batch_size] == [len(examples_of(step.validation))]


def test_natural_sampling_may_have_more_sources_than_examples_per_step(config):
    config.bilevel.global_batch_size = 2
    config.data.sampling = "natural"
    assert sum(sampler_of(load_dataset(config), config, 0, 1).step(1).num_examples) == 2


def test_steps_count_from_one(config):
    with pytest.raises(ValueError, match="steps count from 1, not 0"):
        sampler_of(load_dataset(config), config, 0, 1).step(0)


def test_with_replacement_an_example_comes_again_before_all_have_come_and_each_comes_as_often(config):
    config.data.sampling, config.data.replacement = "natural", True
    pool = config.bilevel.global_batch_size = sum(SIZES.values())
    sampler, again = (sampler_of(load_dataset(config), config, 0, 1) for _ in range(2))
    found = [examples_of(sampler.step(step).train) for step in range(1, 401)]
    assert examples_of(again.step(117).train) == found[116], "late steps need no replay"
    assert all(len(batch) < pool for batch in found), "a step of all examples has some of them twice"
    total = sum(found, Counter())
    assert len(total) == pool and all(abs(count - 400) < 5 * 400**0.5 for count in total.values())


def test_each_step_has_examples_of_every_validation_set_by_their_weights(config, write):
    """8 of 4 + 5 records, weights 3 and 1: 6 and 2 in every step; of one set all, in the order of old."""
    alone = [sampler_of(load_dataset(config), config, 0, 1).step(step) for step in (1, 2)]
    config.data.validation = [
        {"name": "m", "path": write("m.jsonl", records("m", 4)), "weight": 3},
        {"name": "v", "path": write("w.jsonl", records("v", 5)), "weight": 1},
    ]
    config.bilevel.validation_batch_size = 8
    dataset = load_dataset(config)
    ranks = [sampler_of(dataset, config, rank, 2).step(3) for rank in range(2)]
    found = sum((examples_of(batch.validation) for batch in ranks), Counter())
    by_set = [sum(times for key, times in found.items() if key[0] == number) for number in range(2)]
    tokens = [sum(len(key[2]) * times for key, times in found.items() if key[0] == number) for number in range(2)]
    for batch in ranks:
        assert batch.num_validation_examples == by_set == [6, 2] and batch.num_validation_loss_tokens == tokens
        assert batch.validation_weights == [0.75, 0.25]
    assert all(batch.num_validation_examples == [4] and batch.validation_weights == [1.0] for batch in alone)
