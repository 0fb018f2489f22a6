"""From a YAML file and `section.key=value` overrides to a configuration, and back to YAML."""

import dataclasses
import hashlib
import json
import typing
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_scalebio.config.errors import UserError
from megatron_scalebio.config.settings import PRESETS, Config, SourceConfig

# Settings that name a file or folder, and the words among their values that do not.
_PATHS: dict[str, tuple[str, ...]] = {
    "model.hf_path": (),
    "data.tokenizer": ("bytes",),
    "data.template": ("auto", "plain", "alpaca"),
    "data.validation": (),
    "data.test": (),
    "bilevel.weights": (),
}


class _Setting(NamedTuple):
    key: str  # "section.name"
    value: Any
    where: str  # the file's path, or "command line"


def load_config(path: str | None, overrides: list[str]) -> Config:
    """Merges defaults, preset, the YAML file at `path` and `section.key=value` overrides, the later the stronger.

    Paths in the file are taken relative to it, on the command line and for `run.output_dir` relative to the working
    directory; all come out absolute. A `weights.json` given as `bilevel.weights` is read into a mapping.

    Raises:
        UserError: unreadable file, unknown key or value of the wrong type; all of them in one message.
    """
    problems: list[str] = []
    settings = _settings(path, overrides, problems)
    tree = OmegaConf.structured(Config)
    for setting in settings:
        _apply(tree, setting, problems)
    if problems:
        raise UserError("\n".join(problems))
    preset = PRESETS.get(tree.bilevel.preset)
    if preset is None:
        raise UserError(
            f"bilevel.preset={tree.bilevel.preset}: must be one of {', '.join(PRESETS)}"
            f" (nearest: {nearest(tree.bilevel.preset, PRESETS)})"
        )
    for key, value in preset.items():
        if OmegaConf.select(tree, key) is None:
            OmegaConf.update(tree, key, value)
    config: Config = OmegaConf.to_object(tree)
    config.run.output_dir = str(Path(config.run.output_dir).absolute())
    if isinstance(config.bilevel.weights, str):
        config.bilevel.weights = _read_weights(config.bilevel.weights)
    if config.data.tokenizer is None:
        config.data.tokenizer = config.model.hf_path or "bytes"
    return config


def given_settings(path: str | None, overrides: list[str]) -> dict[str, Any]:
    """{"section.key": value} of what `load_config` was given, defaults and preset left out."""
    return {setting.key: setting.value for setting in _settings(path, overrides, [])}


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """The known word most like `word`; of dotted keys the last part counts as much as the whole."""

    def likeness(candidate: str) -> float:
        pairs = (word, candidate), (word.rpartition(".")[2], candidate.rpartition(".")[2])
        return sum(SequenceMatcher(None, a.lower(), b.lower()).ratio() for a, b in pairs)

    return max(known, key=likeness)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every setting of a (part of a) configuration as {"section.key": value}; lists and mappings are values."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = value
    return flat


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dictionaries."""
    return dataclasses.asdict(config)


def config_sha256(config: Config) -> str:
    """Hash of the resolved configuration without `run`, but with its seed: what decides a run's numbers."""
    tree = to_dict(config)
    tree["run"] = {"seed": config.run.seed}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def write_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration as YAML that `load_config` reads back to an equal one."""
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _settings(path: str | None, overrides: list[str], problems: list[str]) -> list[_Setting]:
    """The file's settings, then the command line's."""
    settings = _file_settings(Path(path), problems) if path is not None else []
    for override in overrides:
        settings += _override_settings(override, problems)
    return settings


def _file_settings(path: Path, problems: list[str]) -> list[_Setting]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OSError as error:
        raise UserError(f"configuration file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as model, data, bilevel; got {_shown(tree)}")
    settings = _leaves(tree, Config, "", str(path), problems)
    return [setting._replace(value=_absolute(setting, path.absolute().parent)) for setting in settings]


def _override_settings(override: str, problems: list[str]) -> list[_Setting]:
    where = "command line"
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"{where}: expected section.key=value, got {override!r}")
        return []
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problems.append(f"{where}: {override!r}: {str(error).splitlines()[0]}")
        return []
    tree: Any = value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    settings = _leaves(tree, Config, "", where, problems)
    return [setting._replace(value=_absolute(setting, Path.cwd())) for setting in settings]


def _leaves(tree: dict[str, Any], schema: type, prefix: str, where: str, problems: list[str]) -> list[_Setting]:
    """Flattens `tree` along the schema, noting every unknown key and every section that is not one."""
    kinds = typing.get_type_hints(schema)
    settings: list[_Setting] = []
    for name, value in tree.items():
        key, kind = f"{prefix}{name}", kinds.get(name)
        if kind is None:
            known = nearest(key, [*flatten(Config()), *(f"{prefix}{name}" for name in kinds)])
            problems.append(f"{where}: unknown setting {key} (nearest: {known})")
        elif dataclasses.is_dataclass(kind):
            if isinstance(value, dict):
                settings += _leaves(value, kind, f"{key}.", where, problems)
            else:
                names = ", ".join(typing.get_type_hints(kind))
                problems.append(f"{where}: {key} is a section with {names}; got {_shown(value)}")
        else:
            if key == "data.sources":
                _check_source_keys(value, where, problems)
            settings.append(_Setting(key, value, where))
    return settings


def _check_source_keys(sources: Any, where: str, problems: list[str]) -> None:
    names = list(typing.get_type_hints(SourceConfig))
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        for name in source if isinstance(source, dict) else []:
            if name not in names:
                known = nearest(str(name), names)
                problems.append(f"{where}: unknown setting data.sources[{index}].{name} (nearest: {known})")


def _absolute(setting: _Setting, folder: Path) -> Any:
    """The setting's value with its paths made absolute: relative ones are taken from `folder`."""

    def resolve(value: Any) -> Any:
        return str((folder / Path(value).expanduser()).resolve()) if isinstance(value, str) and value else value

    if setting.key == "data.sources" and isinstance(setting.value, list):
        return [
            {**source, "path": resolve(source["path"])} if isinstance(source, dict) and "path" in source else source
            for source in setting.value
        ]
    if setting.key not in _PATHS or setting.value in _PATHS[setting.key]:
        return setting.value
    return resolve(setting.value)


def _apply(tree: DictConfig, setting: _Setting, problems: list[str]) -> None:
    try:
        # A merge replaces a list, too, and makes its mappings SourceConfig; a mapping it would only add to.
        OmegaConf.update(tree, setting.key, setting.value, merge=setting.key == "data.sources")
    except (OmegaConfBaseException, ValueError):
        problems.append(f"{setting.where}: {setting.key} must be {_expected(setting.key)}, got {_shown(setting.value)}")
        return
    if setting.key == "data.sources":
        for index, source in enumerate(setting.value):
            for name in ("name", "path"):
                if name not in source:
                    problems.append(f"{setting.where}: data.sources[{index}] has no {name}: {_shown(source)}")


def _expected(key: str) -> str:
    if key == "data.sources":
        return "a list of {name, path}"
    kind: Any = Config
    for part in key.split("."):
        kind = typing.get_type_hints(kind)[part]
    kinds = typing.get_args(kind) or (kind,)
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    if typing.get_origin(kind) is list:
        return "a list of numbers"
    return " or ".join(words.get(kind, str(kind)) for kind in kinds)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def _read_weights(path: str) -> dict[str, float]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"bilevel.weights: {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"bilevel.weights: {path}: not valid JSON: {error}") from error
    weights = content.get("weights", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f'bilevel.weights: {path}: expected {{"weights": {{name: weight}}}}, got {_shown(content)}')
    return weights
