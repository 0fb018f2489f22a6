"""`python -m megatron_scalebio compare`: do learned weights pay, on the user's own test set, at equal cost?

Every arm is a way to spend the same number of executed FLOPs; all are run with the same seeds, and compared seed by
seed. Shapes and arithmetic of the cost: plan/flops.py.
"""

from megatron_scalebio.compare.arms import ARMS as ARMS
from megatron_scalebio.compare.comparison import compare as compare
