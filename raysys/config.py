"""The one place that composes, validates and instantiates Hydra configs.

A job is a function of a plain, resolved dict; `run_job` makes that dict from `configs/` and the command line. Classes are
named by `_target_` and get ordinary typed arguments, so a class of the user's own package works like one of ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import hashlib
import importlib
import inspect
import json
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from raysys.errors import UserError, nearest

T = TypeVar("T")
Config = dict[str, Any]


def config_folder() -> Path:
    """The Hydra tree: inside an installed wheel, or beside the package in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.exists() else Path(__file__).parent.parent / "configs"


def compose(overrides: Sequence[str] = (), name: str = "train", config_dir: str | None = None) -> Config:
    """The resolved config `name` with Hydra overrides (`train.batch_size=4096`, `model=dlrm`).

    config_dir: a folder of the user's own config groups, searched after ours. A wrong key or group is a `UserError`
    that names the nearest valid one.
    """
    folders = [config_folder()]
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(f"--config-dir {config_dir}: no such folder")
        folders.append(Path(config_dir).resolve())
    search = [f"hydra.searchpath=['file://{folder}']" for folder in folders[1:]]
    groups = [text for text in overrides if any((folder / text.partition("=")[0]).is_dir() for folder in folders)]

    def known() -> Config:
        """All keys of the config with the chosen group options."""
        return dict(_items(_container(hydra_compose(name, [*search, *groups]))))

    with initialize_config_dir(str(folders[0].resolve()), version_base="1.3"):
        try:
            config = hydra_compose(name, [*search, *_with_open_mappings(overrides, known)])
            content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: a number for a group
            raise _explain(error, known, folders) from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def flat(overrides: Sequence[str | Sequence[str]]) -> list[str]:
    """Overrides with the entries of a list in the list's place, so that a config file can name some of them together."""
    return [one for entry in overrides for one in ([entry] if isinstance(entry, str) else entry)]


def _with_open_mappings(overrides: Sequence[str], known: Callable[[], Config]) -> list[str]:
    """`key={...}` of a key that exists as `++key={...}`: Hydra takes every mapping for complete, also `clip: {}`.

    What a mapping may hold is checked where it is used: by `validate`, or by the constructor that gets it.
    """
    mappings = {text.partition("=")[0] for text in overrides if text.partition("=")[2].lstrip().startswith("{")}
    existing = mappings and mappings & known().keys()
    return [f"++{text}" if text.partition("=")[0] in existing else text for text in overrides]


def _explain(error: Exception, known: Callable[[], Config], folders: Sequence[Path]) -> UserError:
    """Hydra's composition error as one line with the nearest valid key or group option."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match.group(1), known())
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match.group(1).rpartition("/")
        options = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
        return UserError(f"no config {option!r} in group {group or '/'!r}", nearest(option, options))
    if isinstance(error, MissingMandatoryValue):
        return UserError(f"config key {error.full_key!r} has no default", f"give it: {error.full_key}=...")
    if match := re.search(r"You must specify '([^']+)'", text):
        options = {path.stem for folder in folders for path in (folder / match.group(1)).glob("*.yaml")}
        return UserError(
            f"config group {match.group(1)!r} has no default", f"take one of: {', '.join(sorted(options))}"
        )
    if match := re.search(r"Error parsing override '([^']+)'|^(LexerNoViableAlt|no viable alternative).*", text):
        return UserError(
            f"{match.group(1) or text.splitlines()[0]!r} is no override", "write key=value, in quotes where needed"
        )
    return UserError("config: " + " ".join(text.split()))


def _unknown_key(wrong: str, known: Config) -> UserError:
    parent, _, last = wrong.rpartition(".")
    if known.get(parent, {}) is None:
        return UserError(f"config key {wrong!r}: {parent} is null", f"give it as a whole: {parent}={{{last}: ...}}")
    close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    siblings = [key for key in known if key.rpartition(".")[0] == parent]
    hint = f"did you mean {close[0]!r}?" if close else f"known keys there: {', '.join(siblings) or ', '.join(known)}"
    return UserError(f"unknown config key {wrong!r}", hint)


def _container(config: Any) -> Config:
    content = OmegaConf.to_container(config)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _items(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All keys with their values, nested ones as `group.key`."""
    for key, value in config.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _items(value, f"{prefix}{key}.")


def instantiate(node: Config, *args: Any, allowed: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """Call the class or function that `node["_target_"]` names with the node's other keys and the given arguments.

    Nested nodes with a `_target_` are instantiated first. allowed: see `locate`. An unknown or missing argument is a
    `UserError`. With `_partial_: true` the call waits for the arguments that its user gives: a `functools.partial`.
    """
    path = node.get("_target_")
    if not isinstance(path, str):
        raise UserError(f"a config node needs a _target_ that names a class, found keys {', '.join(node)}")
    target = locate(path, allowed)
    given = {key: value for key, value in node.items() if key not in ("_target_", "_partial_")}
    values = {key: _instantiate_nested(value, allowed) for key, value in given.items()} | kwargs
    known = arguments_of(target)
    for key in values:
        if known is not None and key not in known:
            others = [name for name in known if name not in kwargs][len(args) :]
            raise UserError(f"{path} has no argument {key!r}", nearest(key, others))
    signature = inspect.signature(target)
    if node.get("_partial_", False):
        return functools.partial(target, *args, **values)
    try:
        signature.bind(*args, **values)
    except TypeError as error:
        raise UserError(f"{path}: {error}", "give it in the config node that names this _target_") from None
    return target(*args, **values)


def arguments_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """What a class or function takes by name; None where that may be anything.

    A constructor with `**arguments` passes them on: what the one of its base class takes counts, too.
    """
    steps: list[Callable[..., Any]] = [target]
    if inspect.isclass(target):
        steps += [base for base in target.__mro__[1:-1] if "__init__" in vars(base)]
    found: dict[str, inspect.Parameter] = {}
    for step in steps:
        parameters = inspect.signature(step).parameters
        named = {key: value for key, value in parameters.items() if value.kind is not inspect.Parameter.VAR_KEYWORD}
        found = found | {key: value for key, value in named.items() if key not in found}
        if len(named) == len(parameters):
            return found
    return None


def _instantiate_nested(value: Any, allowed: Sequence[str] | None) -> Any:
    if isinstance(value, dict):
        if "_target_" in value:
            return instantiate(value, allowed=allowed)
        return {key: _instantiate_nested(item, allowed) for key, item in value.items()}
    if isinstance(value, list):
        return [_instantiate_nested(item, allowed) for item in value]
    return value


def locate(path: str, allowed: Sequence[str] | None = None) -> Callable[..., Any]:
    """The class or function of a dotted path; a `UserError` where it does not exist.

    allowed: for a config that comes with a bundle, the prefixes of what it may name, such as `raysys.`: a class that is
    defined there. A function could do anything with its arguments, and a module holds what it has imported, too.
    """
    if allowed is not None and not path.startswith(tuple(allowed)):
        raise UserError(f"_target_ {path!r} is refused", f"allowed prefixes: {', '.join(allowed)}")
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UserError(f"_target_ {path!r} is no dotted path", "write package.module.Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"_target_ {path!r}: {error}", "is the package on PYTHONPATH?") from None
    target = getattr(module, name, None)
    if not callable(target):
        callables = [key for key, value in vars(module).items() if inspect.isclass(value) or inspect.isfunction(value)]
        raise UserError(f"_target_ {path!r}: module {module_name!r} has no {name!r}", nearest(name, callables))
    if allowed is not None and not (inspect.isclass(target) and target.__module__.startswith(tuple(allowed))):
        raise UserError(
            f"_target_ {path!r} is refused: it is no class of {module_name!r}", "a bundle names classes only"
        )
    return target


def validate(kind: type[T], node: Config, where: str = "") -> T:
    """A settings dataclass from the config node at the key `where`, or from a whole config.

    Types are checked and unknown keys named with the nearest valid one.
    """
    try:
        return TypeAdapter(kind).validate_python(node)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([*([where] if where else []), *(str(part) for part in first["loc"])])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise UserError(
                f"unknown config key {key!r}", nearest(str(first["loc"][-1]), _fields(kind, first["loc"][:-1]))
            ) from None
        if first["type"] in ("missing", "missing_argument"):
            raise UserError(f"config key {key!r} is missing", "--show-config prints the keys that there are") from None
        raise UserError(f"config key {key!r} is {first['input']!r}", first["msg"]) from None


def _fields(kind: Any, path: Sequence[int | str]) -> list[str]:
    """The fields of the dataclass at `path` within another one, through optional values and mappings."""
    for part in path:
        kind = get_type_hints(kind).get(str(part), kind)
        kind = next(inner for inner in (kind, *get_args(kind)) if dataclasses.is_dataclass(inner))
    return [field.name for field in dataclasses.fields(kind)]


def fingerprint(config: Config) -> str:
    """A hash of a resolved config, the same on every machine."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _quieten_libraries() -> None:
    """Leave out what torch and TorchRec tell each other's developers; all others, the user's own model too, are heard."""
    warnings.filterwarnings("ignore", "Please use DTensor instead", FutureWarning)  # of torch, for TorchRec's tables
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPTaskTowers\) returned a view", UserWarning)
    for logger in ("torch", "torchrec", "fbgemm_gpu"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    logging.getLogger().addFilter(_is_heard)


def _is_heard(record: logging.LogRecord) -> bool:
    """Whether a record of the root logger is to be shown: TorchRec warns there of every table that it replicates."""
    return record.levelno >= logging.ERROR or "torchrec" not in Path(record.pathname).parts


def run_job(
    main: Callable[[Config], None],
    name: str,
    description: str,
    argv: Sequence[str] | None = None,
    can_dry_run: bool = False,
) -> None:
    """Start a job: compose its config from the command line, call `main`, and end errors of the user in one line.

    The config that `main` gets has two keys more: `debug`, and `dry_run` where the job can do that.
    Exit status: 0, 2 after a `UserError` (message and hint on stderr; `--debug` shows the traceback), 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(description=description, epilog="Config keys: group=option or key.path=value.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--config-dir", help="a folder with config groups of your own")
    if can_dry_run:
        parser.add_argument("--dry-run", action="store_true", help="print what would be done and do nothing")
    parser.add_argument("--show-config", action="store_true", help="print the resolved config and do nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args(argv)
    if not arguments.debug:
        _quieten_libraries()
    try:
        config = compose(arguments.overrides, name, arguments.config_dir)
        if arguments.show_config:
            print(OmegaConf.to_yaml(config), end="")
            return
        main(config | {key: value for key, value in vars(arguments).items() if key in ("debug", "dry_run")})
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
