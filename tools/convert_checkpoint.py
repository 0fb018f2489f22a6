"""Between training checkpoints and Hugging Face folders.

    torchrun --nproc_per_node N tools/convert_checkpoint.py export RUN/checkpoints/step_100 FOLDER [--verify]
    torchrun --nproc_per_node N tools/convert_checkpoint.py import --config FILE.yaml [section.key=value ...]

export: the upper model of a run's checkpoint as a Hugging Face folder, on as many ranks as the run had (one: plain
python will do). --verify compares it with what transformers computes from FOLDER: the log-probability that each gives
to random tokens. import: the model of model.hf_path as checkpoints/step_0 of a new run.output_dir, where a run of the
same settings with run.resume=auto begins as it would from the folder, which must stay where it is.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

if TYPE_CHECKING:
    from megatron_scalebio.mcore.models import MegatronModels

# Mean distance of log-probabilities, by the coarsest of what the run computes in, its frozen weights and the export;
# transformers computes in fp32. Rounding explains some 1e-5 and some hundredths; a tensor in the wrong place gives
# whole numbers.
TOLERANCE = {"fp64": 1e-4, "fp32": 1e-4, "bf16": 0.2, "fp8": 0.2}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export")
    export.add_argument("checkpoint", type=Path, help="RUN/checkpoints/step_N")
    export.add_argument("folder", type=Path, help="the Hugging Face folder to write; must not exist")
    export.add_argument("--dtype", choices=("bf16", "fp32"), help="default: as the run")
    export.add_argument("--verify", action="store_true", help="compare with transformers")
    into = commands.add_parser("import")
    into.add_argument("--config", required=True)
    into.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_args()
    for module in (r"megatron\.core", r"torch\.distributed\.checkpoint"):  # of optional packages, and deprecations
        warnings.filterwarnings("ignore", module=module)
    from megatron_scalebio.config import UserError

    try:
        status = export_checkpoint(args) if args.command == "export" else import_folder(args)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    torch.distributed.destroy_process_group()
    return status


def export_checkpoint(args: argparse.Namespace) -> int:
    from megatron_scalebio.active_layers import Role
    from megatron_scalebio.checkpoint import load_models, read_state
    from megatron_scalebio.config import UserError, load_config
    from megatron_scalebio.data import load_tokenizer
    from megatron_scalebio.device import choose_device
    from megatron_scalebio.mcore.export import export_model
    from megatron_scalebio.mcore.models import MegatronModels
    from megatron_scalebio.mcore.process_groups import start_process_groups
    from megatron_scalebio.run_folder import RunFolder

    folder = RunFolder(args.checkpoint.resolve().parent.parent)
    if not (args.checkpoint / "state.json").is_file() or not folder.config.is_file():
        raise UserError(f"{args.checkpoint}: not a checkpoint of a run: expected RUN/checkpoints/step_N")
    if args.folder.exists():
        raise UserError(f"{args.folder} exists, and is not overwritten: name another folder")
    config = load_config(str(folder.config), [])  # resolved already
    config.run.export_dtype = args.dtype or config.run.export_dtype
    ranks, needed = int(os.environ.get("WORLD_SIZE", 1)), config.parallel.tensor * config.parallel.pipeline
    if ranks % needed:
        raise UserError(
            f"{args.checkpoint} is of parallel.tensor={config.parallel.tensor} and parallel.pipeline="
            f"{config.parallel.pipeline}, but {ranks} ranks were started: start as many as the run had, with torchrun"
            f" --nproc_per_node N {Path(__file__).name} export ..., N a multiple of {needed}"
        )
    device = choose_device(config.run.device)
    groups = start_process_groups(config.parallel, device)
    state = read_state(args.checkpoint, config, dataset_fingerprint=None)
    models = MegatronModels(config, groups, device, loads=False)
    if state["active_layers"]:  # an imported checkpoint is before the first draw
        models.redraw({Role(role): layers for role, layers in state["active_layers"].items()})
    load_models(args.checkpoint, state, models.persistence)
    export_model(models, args.folder, load_tokenizer(config.data.tokenizer).end_id)
    if groups.rank == 0:
        print(f"{args.folder}: the upper model after step {state['step']}")
    return verify(models, args.folder) if args.verify else 0


def verify(models: "MegatronModels", folder: Path) -> int:
    """Compare log-probabilities of random tokens; 1 if they are further apart than rounding explains."""
    from transformers import AutoModelForCausalLM

    from megatron_scalebio.data import Example, build_micro_batch

    length = min(models.config.data.max_length, 128)
    tokens = np.random.default_rng(0).integers(models.config.model.shape.vocab_size, size=length + 1, dtype=np.int32)
    row, rows = models.config.data.max_length, models.config.data.micro_batch_size
    example = Example(tokens, np.arange(length + 1) > 0, 0)
    ours = models.token_losses(build_micro_batch([[example]], row, rows, 0))
    if models.groups.rank > 0:
        return 0
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = reference(torch.from_numpy(tokens[:-1]).long().unsqueeze(0)).logits[0].double()
    theirs = torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[1:]).long(), reduction="none")
    distances = (ours - theirs).abs()
    precision, export_dtype = models.config.precision, models.config.run.export_dtype
    dtypes = {precision.compute, precision.frozen_weights or precision.compute, export_dtype}
    equal = distances.mean().item() <= max(TOLERANCE[dtype] for dtype in dtypes)
    print(
        f"log-probabilities of {length} random tokens, ours and transformers': {distances.mean():.1e} apart on average,"
        f" {distances.max():.1e} at most: {'equal to rounding' if equal else 'NOT EQUAL'}"
    )
    return 0 if equal else 1


def import_folder(args: argparse.Namespace) -> int:
    from megatron_scalebio import Trainer, UserError, open_run
    from megatron_scalebio.config import write_config

    run = open_run(args.config, args.overrides)
    config = run.config
    if config.model.hf_path is None:
        raise UserError(f"{args.config}: model.hf_path is not set: it names the folder to import")
    if config.run.resume != "never":
        raise UserError("run.resume=auto: an import begins a new run; leave it at never")
    trainer = Trainer(run)
    trainer.save()
    if trainer.groups.rank == 0:
        write_config(config, trainer.folder.config)
        print(f"{trainer.folder.checkpoint(0)}: {config.model.hf_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
