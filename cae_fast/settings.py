"""Reading settings: a YAML file and overrides from the command line into the classes of config.py.

What stands behind the = of a text setting is that text, to the letter; behind others it is YAML.
"""

import argparse
import ast
import difflib
import inspect
import math
import os
import types
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from cae_fast.config import UserError

PATHS = (
    *("data.path", "data.index", "validation.path", "validation.index", "train.run_dir", "train.init_from"),
    *("train.deepspeed", "target.tokenizer", "encoder.path", "probe.train", "probe.test"),
)
"""Settings in which ~ is the home folder."""


def add_settings(parser: argparse.ArgumentParser, schema: type) -> None:
    """The arguments CONFIG section.field=value ..., and every setting of `schema` in the help text."""
    parser.add_argument("config", help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings changed for this run")
    rows = [f"  {name} = {value!r}\n      {text}".rstrip() for name, (value, text) in field_docs(schema).items()]
    parser.epilog = "settings and their defaults:\n" + "\n".join(rows).replace("%", "%%")


def load_run_config(schema: type, args: argparse.Namespace) -> Any:
    """The configuration that `add_settings`' arguments name; the run folder defaults to runs/NAME of the file."""
    config = load_config(schema, args.config, args.overrides)
    if not config.train.run_dir:
        config.train.run_dir = f"runs/{Path(args.config).stem}"
    return config


def load_config(schema: type, path: str | None, overrides: list[str]) -> Any:
    """Read a YAML file and dotted overrides into `schema` (a dataclass).

    Raises UserError for a missing file, an unknown key (with the nearest valid one), a value of another type, and a
    number out of its limits.
    """
    config = OmegaConf.structured(schema)
    layers = [] if path is None else [read_yaml(path)]
    layers += [parse_override(schema, override) for override in overrides]
    for layer in layers:
        try:
            config = OmegaConf.merge(config, layer)
        except ConfigKeyError as error:
            raise UserError(_unknown_key(schema, str(error.full_key))) from error
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            key = getattr(error, "full_key", None) or "settings"
            raise UserError(f"{key}: {str(error).splitlines()[0]}") from error

    try:
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:  # ${...} that leads nowhere
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    for name, section, item in leaves(loaded):
        value = getattr(section, item.name)
        if name in PATHS and isinstance(value, str) and value.startswith("~"):
            setattr(section, item.name, os.path.expanduser(value))
        check_numbers(name, value, item.metadata.get("low", 0.0), item.metadata.get("high", 2.0**31 - 1))
    return loaded


def read_yaml(path: str) -> Any:
    """The settings of a file; UserError where it is none."""
    if not Path(path).is_file():
        raise UserError(f"config: {path} is not a file")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # what the YAML library and the file system raise
        raise UserError(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"config: {path} must hold sections such as data: and train:, not a list or a single value")
    return loaded


def parse_override(schema: type, override: str) -> Any:
    """section.field=value as nested settings."""
    name, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r}: write it as section.field=value")
    if is_text(schema, name) and text != "null":
        nested: Any = text.replace("${", "\\${")
        for key in reversed(name.split(".")):
            nested = {key: nested}
        return OmegaConf.create(nested)
    try:
        return OmegaConf.from_dotlist([override])
    except Exception as error:  # what the YAML library raises for what is none
        raise UserError(f"{name}={text}: not a value ({' '.join(str(error).split())[:200]})") from error


def is_text(schema: type, name: str) -> bool:
    """Whether the setting of this dotted name is a text, or may be one."""
    kind: Any = schema
    for key in name.split("."):
        if not is_dataclass(kind):
            return False
        kind = typing.get_type_hints(kind).get(key)
    return kind is str or (isinstance(kind, types.UnionType) and str in typing.get_args(kind))


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, section, dataclass field) of every setting that is no section."""
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, config, item


def check_numbers(name: str, value: Any, low: float, high: float) -> None:
    """UserError for a number, or one of a list, that is not finite or not within the limits."""
    if isinstance(value, list):
        for number in value:
            check_numbers(name, number, low, high)
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not math.isfinite(value):
        raise UserError(f"{name} is {value}: it must be a finite number")
    if not low <= value <= high:
        raise UserError(f"{name} is {value}: it must be from {low:.15g} to {high:.15g}")


def _unknown_key(schema: type, key: str) -> str:
    near = difflib.get_close_matches(key, field_docs(schema), n=1, cutoff=0.0)
    return f"unknown setting {key}; the nearest valid one is {near[0]}"


def field_docs(schema: type, prefix: str = "", defaults: Any = None) -> dict[str, tuple[Any, str]]:
    """Every leaf setting of a configuration class: {dotted name: (default, the text below the field)}."""
    texts: dict[str, str] = {}
    for part in schema.__mro__[-2::-1]:  # a subclass may say more of a field
        body = ast.parse(inspect.getsource(part)).body[0].body  # type: ignore[attr-defined]
        for node, after in pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                texts[node.target.id] = str(after.value.value)  # type: ignore[union-attr]
    docs: dict[str, tuple[Any, str]] = {}
    defaults = schema() if defaults is None else defaults
    for item in fields(schema):
        value = getattr(defaults, item.name)
        if is_dataclass(value):
            docs |= field_docs(type(value), f"{prefix}{item.name}.", value)
        else:
            docs[prefix + item.name] = (value, texts.get(item.name, ""))
    return docs
