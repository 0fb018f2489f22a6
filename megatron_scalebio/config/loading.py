"""From a YAML file and `section.key=value` overrides to a configuration, and back to YAML."""

import copy
import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_scalebio.config.declare import Setting, is_section
from megatron_scalebio.config.errors import UserError
from megatron_scalebio.config.settings import PRESETS, SETTINGS, SOURCE_SETTINGS, Config
from megatron_scalebio.config.unknown import NO_SPACE, glued, unknown, unknown_of_source


class _Given(NamedTuple):
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
    return completed(cast(Config, OmegaConf.to_object(tree)))


def completed(config: Config) -> Config:
    """A copy in which what is null has the preset's value, and files and folders stand as `load_config` gives them.

    Raises: UserError, if `bilevel.preset` or a weights file that is named cannot be read.
    """
    if problem := SETTINGS["bilevel.preset"].problem(config.bilevel.preset):
        raise UserError(problem)
    flat = flatten(config)
    usual = PRESETS[config.bilevel.preset] | {"data.tokenizer": config.model.hf_path or "bytes"}
    filled = {key: value for key, value in usual.items() if flat[key] is None}
    config = changed(config, filled | {"run.output_dir": str(Path(config.run.output_dir).absolute())})
    if isinstance(config.bilevel.weights, str):
        config.bilevel.weights = _read_weights(config.bilevel.weights)
    return config


def changed(config: Config, values: dict[str, Any]) -> Config:
    """A copy with other values: {"section.key": value}."""
    result = copy.deepcopy(config)
    for key, value in values.items():
        *sections, name = key.split(".")
        setattr(functools.reduce(getattr, sections, result), name, value)
    return result


def given_settings(path: str | None, overrides: list[str]) -> dict[str, Any]:
    """{"section.key": value} of what `load_config` was given, defaults and preset left out."""
    return {setting.key: setting.value for setting in _settings(path, overrides, [])}


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


def _settings(path: str | None, overrides: list[str], problems: list[str]) -> list[_Given]:
    """The file's settings, then the command line's."""
    settings = _file_settings(Path(path), problems) if path is not None else []
    for override in overrides:
        settings += _override_settings(override, problems)
    return settings


def _file_settings(path: Path, problems: list[str]) -> list[_Given]:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except OSError as error:
        raise UserError(f"configuration file {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML: {_yaml_problem(error)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as model, data, bilevel; got {_shown(tree)}")
    if found := glued(tree):
        problems.append(f"{path}: {found}")
        return []
    settings = _leaves(tree, Config, "", str(path), problems)
    return [setting._replace(value=_absolute(setting, path.absolute().parent)) for setting in settings]


def _yaml_problem(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem}; {NO_SPACE}" if problem == "found unexpected ':'" else problem


def _override_settings(override: str, problems: list[str]) -> list[_Given]:
    where = "command line"
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"{where}: expected section.key=value, got {override!r}")
        return []
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        problems.append(f"{where}: {override!r}: {_yaml_problem(error)}")
        return []
    tree: Any = cast(dict[str, Any], parsed)["value"]
    for part in reversed(key.split(".")):
        tree = {part: tree}
    if found := glued(tree):
        problems.append(f"{where}: {found}")
        return []
    settings = _leaves(tree, Config, "", where, problems)
    return [setting._replace(value=_absolute(setting, Path.cwd())) for setting in settings]


def _leaves(tree: dict[Any, Any], schema: type, prefix: str, where: str, problems: list[str]) -> list[_Given]:
    """Flattens `tree` along the schema, noting every unknown key and every section that is not one."""
    kinds = {item.name: item.type for item in dataclasses.fields(schema)}
    settings: list[_Given] = []
    for name, value in tree.items():
        key, kind = f"{prefix}{name}", kinds.get(name)
        if kind is None:
            problems += [f"{where}: {message}" for message in unknown(key, value)]
        elif is_section(kind):
            if isinstance(value, dict):
                settings += _leaves(value, kind, f"{key}.", where, problems)
            else:
                names = [item.name for item in dataclasses.fields(kind)]
                hint = f"; {NO_SPACE}" if str(value).partition(":")[0] in names else ""
                problems.append(f"{where}: {key} is a section with {', '.join(names)}; got {_shown(value)}{hint}")
        elif key == "data.sources" and (surplus := _unknown_source_keys(value)):
            problems += [f"{where}: {message}" for message in surplus]
        else:
            settings.append(_Given(key, value, where))
    return settings


def _unknown_source_keys(sources: Any) -> list[str]:
    return [
        unknown_of_source(f"data.sources[{index}].{name}", list(SOURCE_SETTINGS))
        for index, source in enumerate(sources if isinstance(sources, list) else [])
        for name in (source if isinstance(source, dict) else [])
        if name not in SOURCE_SETTINGS
    ]


def _absolute(setting: _Given, folder: Path) -> Any:
    """The setting's value with its paths made absolute: relative ones are taken from `folder`."""

    def resolve(value: Any, declaration: Setting) -> Any:
        is_path = declaration.path and isinstance(value, str) and value and value not in declaration.words
        return str((folder / Path(value).expanduser()).resolve()) if is_path else value

    def resolve_source(source: dict[str, Any]) -> dict[str, Any]:
        return {name: resolve(value, SOURCE_SETTINGS[name]) for name, value in source.items()}

    if SETTINGS[setting.key].several and isinstance(setting.value, list):
        return [
            item | {"path": resolve(item["path"], SETTINGS[setting.key])}
            if isinstance(item, dict) and "path" in item
            else item
            for item in setting.value
        ]
    if setting.key == "data.sources" and isinstance(setting.value, list):
        return [resolve_source(source) if isinstance(source, dict) else source for source in setting.value]
    return resolve(setting.value, SETTINGS[setting.key])


def _apply(tree: DictConfig, setting: _Given, problems: list[str]) -> None:
    try:
        # A merge replaces a list, too, and makes its mappings SourceConfig; a mapping it would only add to.
        OmegaConf.update(tree, setting.key, setting.value, merge=setting.key == "data.sources")
    except (OmegaConfBaseException, ValueError):
        problems.append(
            f"{setting.where}: {setting.key} must be {SETTINGS[setting.key].expected}, got {_shown(setting.value)}"
        )
        return
    if setting.key == "data.sources":
        for index, source in enumerate(setting.value):
            for name in ("name", "path"):
                if name not in source:
                    problems.append(f"{setting.where}: data.sources[{index}] has no {name}: {_shown(source)}")


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
