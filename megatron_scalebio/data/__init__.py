"""From JSON Lines to micro-batches."""

from megatron_scalebio.data.batch import MicroBatch, StepBatch
from megatron_scalebio.data.dataset import Dataset, Example, load_dataset
from megatron_scalebio.data.packing import build_micro_batch
from megatron_scalebio.data.sampler import Sampler
from megatron_scalebio.data.tokenizers import load_tokenizer

__all__ = [
    "Dataset",
    "Example",
    "MicroBatch",
    "Sampler",
    "StepBatch",
    "build_micro_batch",
    "load_dataset",
    "load_tokenizer",
]
