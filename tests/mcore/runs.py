"""Short runs of the Megatron models for tests: the same examples, weights and draws under every layout.

`run_case` runs a case on all ranks of its layout and puts their shards together: full tensors by global name.

Shapes: K sources.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_scalebio.active_layers import Role, draw_active_layers, period_of
from megatron_scalebio.anatomy import padded_vocab_size
from megatron_scalebio.anatomy.tensors import shard
from megatron_scalebio.bilevel import Bilevel, StepResult
from megatron_scalebio.config import Config, DataConfig
from megatron_scalebio.data import Example, MicroBatch, StepBatch, build_micro_batch
from megatron_scalebio.data.batch import Rows
from megatron_scalebio.data.packing import plan_microbatches, rows_of
from megatron_scalebio.device import CPU
from megatron_scalebio.mcore.models import MegatronModels
from megatron_scalebio.mcore.parameters import NamedParameter
from megatron_scalebio.mcore.process_groups import ProcessGroups, start_process_groups
from megatron_scalebio.mcore.weight_store import Block
from megatron_scalebio.trainer import make_source_weights
from tests.configs import resolved
from tests.distributed import run_distributed
from tests.reference import Weights, random_weights

VOCAB_SIZE = 100  # padded to 128: under TP2 both ranks hold entries, one of them padding too
MAX_LENGTH = 24
SOURCES_OF_STEP = ((0, 0, 0, 1, 1, 2, 2, 2, 2), (0, 1, 1, 1, 1, 2, 2), (0, 0, 1, 1, 1, 1, 1, 2, 2))

# Large learning rates, so that a wrong update is far outside every tolerance.
SMALL_RUN = (
    *("model.shape.num_layers=4", "model.shape.hidden_size=32", "model.shape.ffn_hidden_size=48"),
    *("model.shape.num_attention_heads=4", "model.shape.num_query_groups=2"),
    *(f"model.shape.vocab_size={VOCAB_SIZE}", f"data.max_length={MAX_LENGTH}", "data.micro_batch_size=2"),
    *("bilevel.steps=20", "bilevel.global_batch_size=9", "bilevel.logits_lr=0.05", "run.seed=3", "run.device=cpu"),
    "bilevel.logits_gate=0",  # a few steps must move the logits
    *("lisa.num_active_layers=2", "lisa.period=2", "precision.compute=fp64"),
    *("optimizer.lr=1e-3", "optimizer.weight_decay=0.1", "optimizer.warmup=0.1"),
)


@dataclass(frozen=True)
class Case:
    """A few steps under changed settings. `sources_of_step` has the source of each training example, by step, and is
    begun again when it ends; a source may be absent from a step. `draws` has the active layers of lower and upper by
    step, likewise; without, they are drawn as in the product."""

    overrides: tuple[str, ...] = ()
    world_size: int = 1
    steps: int = 5
    sources_of_step: tuple[tuple[int, ...], ...] = SOURCES_OF_STEP
    num_sources: int = 3
    draws: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()
    interpret: bool = False  # run the Triton kernels, where the CPU takes their references

    @property
    def config(self) -> Config:
        return small_config(self.overrides)

    @property
    def source_names(self) -> list[str]:
        return [f"s{index}" for index in range(self.num_sources)]

    def train_examples(self, step: int) -> list[Example]:
        return random_examples(step, self.sources_of_step[(step - 1) % len(self.sources_of_step)])

    def validation_examples(self, step: int) -> list[Example]:
        return random_examples(1000 + step, (0,) * 7)


@cache
def small_config(overrides: tuple[str, ...]) -> Config:
    return resolved(*SMALL_RUN, *overrides, vocab_size=VOCAB_SIZE)


def random_examples(seed: int, source_ids: tuple[int, ...]) -> list[Example]:
    """Examples of 2 to MAX_LENGTH tokens, each with at least one loss token."""
    generator = np.random.default_rng(seed)
    examples = []
    for source_id in source_ids:
        tokens = generator.integers(VOCAB_SIZE, size=generator.integers(2, MAX_LENGTH + 1), dtype=np.int32)
        mask = generator.random(len(tokens)) < 0.6
        mask[0], mask[-1] = False, True
        examples.append(Example(tokens, mask, source_id))
    return examples


def step_batch(case: Case, step: int, data_rank: int, data_size: int) -> StepBatch:
    """A data-parallel rank's part of a step, and the global counts."""
    train, validation = case.train_examples(step), case.validation_examples(step)
    return batch_of(train, validation, case.num_sources, case.config.data, data_rank, data_size)


def batch_of(
    train: list[Example],
    validation: list[Example],
    num_sources: int,
    data: DataConfig,
    data_rank: int = 0,
    data_size: int = 1,
) -> StepBatch:
    """A data-parallel rank's part of a batch of given examples."""

    def micro_batches(examples: list[Example]) -> list[MicroBatch]:
        lengths = [example.num_positions for example in examples]
        plan = plan_microbatches(lengths, data.max_length, data.packing, data.micro_batch_size, data_rank, data_size)
        return [
            build_micro_batch([[examples[i] for i in row] for row in rows], data.max_length, data.micro_batch_size, 0)
            for rows in plan
        ]

    def rows(examples: list[Example]) -> Rows:
        lengths = [example.num_positions for example in examples]
        return rows_of(lengths, data.max_length, data.packing, data.micro_batch_size, data_size)

    return StepBatch(
        train=micro_batches(train),
        validation=micro_batches(validation),
        num_examples=[sum(e.source_id == source for e in train) for source in range(num_sources)],
        num_loss_tokens=[
            sum(int(e.loss_mask.sum()) for e in train if e.source_id == source) for source in range(num_sources)
        ],
        scale=[1.0] * num_sources,
        kept=[1.0] * num_sources,
        validation_weights=[1.0],
        num_validation_examples=[len(validation)],
        num_validation_loss_tokens=[sum(int(e.loss_mask.sum()) for e in validation)],
        num_tokens=sum(e.num_positions for e in [*train, *validation]),
        train_rows=rows(train),
        validation_rows=rows(validation),
    )


@cache
def initial_weights(case: Case) -> Weights:
    """Full tensors, all of them random: a bias that is lost or a norm that is skipped shows."""
    shape = case.config.model.shape
    return random_weights(shape, seed=11, vocab_rows=padded_vocab_size(shape.vocab_size))


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a named tensor."""

    tensor: Tensor
    shard_dim: int | None


Shards = dict[str, Shard]


class RankRun:
    """A case on one rank, step by step."""

    def __init__(self, case: Case):
        self.case, self.config = case, case.config
        self.groups = start_process_groups(self.config.parallel, CPU)
        full, place = initial_weights(case), (self.groups.tensor_rank, self.groups.tensor.size())

        def initial(parameter: NamedParameter) -> Tensor:
            tied_head = parameter.name == "output_layer.weight" and parameter.name not in full
            name = "embedding.word_embeddings.weight" if tied_head else parameter.name
            return shard(parameter.declared, full[name], *place)

        self.models = MegatronModels(self.config, self.groups, CPU, initial)
        self.source_weights = make_source_weights(self.config, case.source_names)
        self.bilevel = Bilevel(self.config, self.source_weights)
        self.active_layers: dict[Role, list[int]] = {}
        self.step = 0

    def redraw(self, step: int) -> None:
        lisa = self.config.lisa
        layers = self.config.model.shape.num_layers
        if draws := self.case.draws:
            self.active_layers = dict(zip(Role, map(list, draws[(step - 1) % len(draws)]), strict=True))
        else:
            self.active_layers = draw_active_layers(lisa, layers, self.config.run.seed, period_of(step, lisa))
        self.models.redraw(self.active_layers)

    def batch(self, step: int) -> StepBatch:
        return step_batch(self.case, step, self.groups.data.rank(), self.groups.data.size())

    def take_step(self) -> StepResult:
        step = self.step + 1
        self.redraw(step)
        result = self.bilevel.step(self.models, step, self.batch(step), self.active_layers)
        self.step = step
        return result

    def weights(self, role: Role) -> Shards:
        """What the blocks compute with; of a block in FP8 what it rounds."""
        return self._shards({name: self._flat(role, name) for name in self.blocks(role)}, role)

    def _flat(self, role: Role, name: str) -> Tensor:
        block, exact = self.blocks(role)[name], self.models.persistence.exact(role, name)
        if block.weights is not None:
            return block.weights
        if exact is None:
            return self.models.store.initial_weights(block)
        flat = torch.empty(block.numel, dtype=exact.dtype)
        dist.all_gather_into_tensor(flat, exact, group=self.groups.data)
        return flat

    def gradients(self, role: Role) -> Shards:
        """The active blocks' gradients after the reduction, before the clip."""
        flat = {}
        for name, active in self.models.active_sets[role].blocks.items():
            flat[name] = torch.empty_like(active.gradient)
            dist.all_gather_into_tensor(flat[name], active.gradient[active.shard].clone(), group=self.groups.data)
        return self._shards(flat, role)

    def blocks(self, role: Role) -> dict[str, Block]:
        return self.models.store.blocks[role]

    def _shards(self, flat: dict[str, Tensor], role: Role) -> Shards:
        return {
            parameter.name: Shard(view.clone(), parameter.declared.cut.dim)
            for name, tensor in flat.items()
            for parameter, view in zip(
                self.blocks(role)[name].parameters, self.blocks(role)[name].views(tensor), strict=True
            )
        }


def state_tensors(models: MegatronModels) -> dict[str, Tensor]:
    """Copies of what a rank holds: both models' weights, masters and moments of what is active, masters on the host."""
    tensors = {}
    for role, active_set in models.active_sets.items():
        for name, block in models.store.blocks[role].items():
            if block.quantized is None:
                tensors[f"{role}/{name}"] = block.weights.clone()
                continue
            tensors[f"{role}/{name}/vectors"] = block.quantized.vectors.clone()
            for index, matrix in enumerate(block.quantized.matrices):
                tensors[f"{role}/{name}/fp8 {index}"] = matrix.data.view(torch.uint8).clone()
                tensors[f"{role}/{name}/scale {index}"] = matrix.scale.clone()
        for name, active in active_set.blocks.items():
            tensors[f"{role}/{name}/master"] = active.master.clone()
        for name, adam in active_set.adam_states().items():
            tensors |= {f"{role}/{name}/{part}": x.clone() for part, x in adam.tensors().items()}
    for role, name in models.store.masters:
        tensors[f"{role}/{name}/frozen master"] = models.store.masters[role, name].clone()
    return tensors


@dataclass(frozen=True)
class Step:
    """One step. Losses and gradients before the update; weights and logits after it. Joined: full tensors."""

    result: StepResult
    active_layers: dict[Role, list[int]]
    gradients: dict[Role, Weights | Shards]
    weights: dict[Role, Weights | Shards]
    source_weights: Tensor  # [K]
    logits: Tensor  # [K]


@dataclass(frozen=True)
class Place:
    """A rank's place in the grid."""

    tensor: int
    data: int


def place_of(groups: ProcessGroups) -> Place:
    return Place(groups.tensor_rank, groups.data.rank())


def take_steps(case: Case) -> tuple[Place, list[Step]]:
    """On every rank: run a case."""
    run, steps = RankRun(case), []
    for _ in range(case.steps):
        result = run.take_step()
        roles = list(run.models.active_sets)
        steps.append(
            Step(
                result,
                run.active_layers,
                {role: run.gradients(role) for role in roles},
                {role: run.weights(role) for role in roles},
                run.source_weights.weights,
                run.source_weights.logits,
            )
        )
    return place_of(run.groups), steps


def run_case(case: Case) -> list[Step]:
    """The steps of a case, of full tensors. Fails where ranks hold different copies of anything."""
    return join_steps(run_distributed(case.world_size, take_steps, case, interpret=case.interpret))


def join_steps(ranks: list[tuple[Place, list[Step]]]) -> list[Step]:
    """What `take_steps` gave on all ranks, put together."""
    places = [place for place, _ in ranks]
    return [join_step(places, list(steps)) for steps in zip(*(steps for _, steps in ranks), strict=True)]


def join_step(places: list[Place], steps: list[Step]) -> Step:
    first = steps[0]
    for other in steps[1:]:
        assert other.active_layers == first.active_layers
        assert torch.equal(other.logits, first.logits)
        assert other.result.validation_loss == first.result.validation_loss
        for role, norm in first.result.grad_norm.items():
            assert torch.equal(other.result.grad_norm[role], norm)
            assert torch.equal(other.result.train_loss[role], first.result.train_loss[role])
    return Step(
        first.result,
        first.active_layers,
        {role: join(places, [step.gradients[role] for step in steps]) for role in first.gradients},
        {role: join(places, [step.weights[role] for step in steps]) for role in first.weights},
        first.source_weights,
        first.logits,
    )


def join(places: list[Place], ranks: list[Shards]) -> Weights:
    """Full tensors from the ranks' shards; copies must be equal bit for bit. A tied head counts as one more copy."""
    full: Weights = {}
    for name in sorted({name for shards in ranks for name in shards}):
        holders = [(place, shards[name]) for place, shards in zip(places, ranks, strict=True) if name in shards]
        by_tensor_rank: dict[int, Tensor] = {}
        for place, held in holders:
            kept = by_tensor_rank.setdefault(place.tensor, held.tensor)
            assert torch.equal(kept, held.tensor), f"data-parallel ranks hold different copies of {name}"
        parts = [by_tensor_rank[rank] for rank in sorted(by_tensor_rank)]
        shard_dim = holders[0][1].shard_dim
        if shard_dim is None:
            assert all(torch.equal(part, parts[0]) for part in parts), f"ranks hold different copies of {name}"
            full[name] = parts[0]
        elif name.endswith("linear_fc1.weight"):  # each rank holds a slice of gate above its slice of up
            halves = [part.chunk(2) for part in parts]
            full[name] = torch.cat([torch.cat([half[index] for half in halves]) for index in range(2)])
        else:
            full[name] = torch.cat(parts, dim=shard_dim)
    return full
