"""A run, opened: everything is checked that can be before the models are built, and nothing is left to derive."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_scalebio.config import (
    Config,
    SourceConfig,
    UserError,
    changed,
    completed,
    flatten,
    given_settings,
    load_config,
)
from megatron_scalebio.data import Dataset, load_dataset, load_tokenizer
from megatron_scalebio.device import check_device
from megatron_scalebio.hf import adopt_checkpoint, check_checkpoint
from megatron_scalebio.launch import is_main_rank
from megatron_scalebio.resolution import DERIVED, resolve, without_derived
from megatron_scalebio.rules import check_config
from megatron_scalebio.run_folder import check_output_dir


@dataclass(frozen=True)
class Run:
    """What a `Trainer` trains: resolved settings (see `resolution`), and the examples."""

    config: Config
    dataset: Dataset


def open_run(
    config: str | Path | Config | None = None,
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    ranks_here: int = 1,
    dry: bool = False,
    writes: bool = True,
) -> Run:
    """Open a run: merge and resolve its settings, check them, this machine's devices and the output folder, and read
    the data.

        run = open_run("FILE.yaml", ["bilevel.steps=100"])

    Args:
        config: a YAML file, a configuration, or None for the defaults. A run's config.yaml may be given, too: what was
            derived follows where the overrides change what it derives from. In a configuration that is resolved
            already, it stays.
        overrides: "section.key=value" each, stronger than `config`.
        world_size: ranks of the whole run; None: torchrun's, else one.
        ranks_here: of them, those that this process stands for on this machine.
        dry: as `--dry-run`: of `model.hf_path` no weights are read, and no optional package is asked for.
        writes: the output folder is going to be written, and must be free. False: it is not looked at.

    Raises: UserError, in one message, for every mistake in settings, data or folders.
    """
    world_size = world_size or int(os.environ.get("WORLD_SIZE", "1"))
    loaded = _load(config, overrides)
    if loaded.model.hf_path is not None and not dry:
        check_checkpoint(loaded.model)
        if loaded.data.tokenizer == "bytes":
            raise UserError(
                f"data.tokenizer=bytes does not fit model.hf_path={loaded.model.hf_path}, whose embedding belongs to"
                " its own tokenizer: remove data.tokenizer, or name a folder"
            )
    check_config(loaded, world_size, None)
    _check_folder(loaded, "never", writes)
    check_device(loaded.run.device, ranks_here)
    if not dry:
        from megatron_scalebio.mcore.te_linear import check_transformer_engine

        check_transformer_engine(loaded.precision)
    tokenizer = load_tokenizer(loaded.data.tokenizer)  # what was quick to find has been found
    check_config(loaded, world_size, tokenizer.vocab_size)
    resolved = resolve(loaded, tokenizer.vocab_size)
    _check_folder(resolved, "auto", writes)
    return Run(resolved, load_dataset(resolved, tokenizer))


def _check_folder(config: Config, resume: str, writes: bool) -> None:
    """On rank 0, of a run that resumes so: whether it is this run that the folder holds needs resolved settings."""
    if writes and config.run.resume == resume and is_main_rank():
        check_output_dir(config)


def open_config(
    config: str | Path | Config | None = None, overrides: Sequence[str] = (), *, world_size: int | None = None
) -> Config:
    """A run's resolved settings without its data, which need not be there: for plans.

    Args:
        world_size: as in `open_run`; None: tensor times pipeline parallelism.

    Raises: UserError.
    """
    loaded = _load(config, overrides)
    nowhere = str(Path("any").absolute())
    if not loaded.data.sources:
        loaded.data.sources = [SourceConfig("any", nowhere)]
    loaded.data.validation = loaded.data.validation or nowhere
    vocab_size = loaded.model.shape.vocab_size or load_tokenizer(loaded.data.tokenizer).vocab_size
    check_config(loaded, world_size or loaded.parallel.tensor * loaded.parallel.pipeline, vocab_size)
    return resolve(loaded, vocab_size)


def _load(config: str | Path | Config | None, overrides: Sequence[str]) -> Config:
    """Settings as merged, with the model's from its checkpoint's config.json where there is one."""
    if isinstance(overrides, str):
        raise TypeError(f"overrides={overrides!r}: a list of section.key=value, not one text")
    if isinstance(config, Config):
        if overrides:
            raise UserError(f"{' '.join(overrides)}: overrides go with a file; change the configuration itself")
        loaded, defaults = completed(config), flatten(Config())
        given = {key: value for key, value in flatten(config).items() if value != defaults[key]}
    else:
        path, changes = None if config is None else str(config), list(overrides)
        given, loaded = given_settings(path, changes), load_config(path, changes)
        every = flatten(Config()).keys()
        if path is not None and changes and given_settings(path, []).keys() >= every:  # a run's config.yaml, resolved
            before = flatten(without_derived(load_config(path, [])))
            follow = [key for key in DERIVED if before[key] is None and key not in given_settings(None, changes)]
            loaded = changed(loaded, dict.fromkeys(follow))
    if loaded.model.hf_path is not None:
        adopt_checkpoint(loaded, given)
    return loaded
