"""A run's folder: the names of what it writes there, whether it may, and how a file is replaced."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_scalebio.config import Config, UserError, config_sha256, flatten, load_config


@dataclass(frozen=True)
class RunFolder:
    """The places of a run's outputs below `run.output_dir`; none need exist."""

    path: Path

    @property
    def weights(self) -> Path:
        return self.path / "weights.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def exported(self, role: str) -> Path:
        """A model as a Hugging Face checkpoint: the upper's, which is what a run is for, or the lower's."""
        return self.path / ("hf" if role == "upper" else f"hf_{role}")

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def profile(self) -> Path:
        """Traces, one file for each rank."""
        return self.path / "profile"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"

    def newest_step(self) -> int | None:
        """The highest step that has a complete checkpoint; directories of other names are ignored."""
        names = [path.name for path in self.checkpoints.glob("step_*")]
        return max((int(match[1]) for name in names if (match := re.fullmatch(r"step_(\d+)", name))), default=None)

    def outputs(self) -> list[str]:
        """The names of those that exist."""
        models = (self.exported("upper"), self.exported("lower"))
        outputs = (self.weights, self.metrics, self.config, self.checkpoints, *models, self.report, self.profile)
        return [output.name for output in outputs if output.exists()]


def check_output_dir(config: Config) -> None:
    """Refuses an output folder that holds another run, or that nobody can write to; deletes nothing.

    Under `run.resume=auto` a run found there is this run if all settings are equal, those of `run` but its seed aside.

    Raises:
        UserError: naming the folder, what it holds and, under `auto`, the settings that differ.
    """
    folder = Path(config.run.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"run.output_dir={folder} is not a folder")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"run.output_dir={folder}: {existing} cannot be written to")
    found = RunFolder(folder).outputs()
    if not found:
        return
    if config.run.resume == "never":
        raise UserError(
            f"run.output_dir={folder} holds another run ({', '.join(found)}): name another folder, or continue that run"
            " with run.resume=auto"
        )
    if "config.yaml" not in found:
        raise UserError(
            f"run.output_dir={folder} holds {', '.join(found)} but no config.yaml to tell which run that was:"
            " name another folder"
        )
    other = load_config(str(folder / "config.yaml"), [])
    if config_sha256(other) != config_sha256(config):
        before, after = flatten(other), flatten(config)
        differing = [
            f"{key}: {before[key]} there, {after[key]} here"
            for key in after
            if before[key] != after[key] and (key == "run.seed" or not key.startswith("run."))
        ]
        raise UserError(
            f"run.output_dir={folder} holds a run with other settings, which run.resume=auto cannot continue:\n  "
            + "\n  ".join(differing)
        )


def replace_file(path: Path, content: str) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
