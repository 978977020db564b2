"""The one place that composes, validates and instantiates Hydra configs.

A job is a function of a plain, resolved dict; `run_job` makes that dict from `configs/` and the command line. Classes are
named by `_target_` and get ordinary typed arguments, so a class of the user's own package works like one of ours.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib
import inspect
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
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
    search = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    with initialize_config_dir(str(config_folder().resolve()), version_base="1.3"):
        try:
            config = hydra_compose(name, [*search, *overrides])
            content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise _explain(error, name) from error
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _explain(error: Exception, name: str) -> UserError:
    """Hydra's composition error as one line with the nearest valid key, group option or spelling."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        wrong = match.group(1)
        keys = list(_keys(_container(hydra_compose(name))))
        close = difflib.get_close_matches(wrong, keys, n=1, cutoff=0.6)
        siblings = [key for key in keys if key.rpartition(".")[0] == wrong.rpartition(".")[0]]
        hint = f"did you mean {close[0]!r}?" if close else f"known keys there: {', '.join(siblings) or ', '.join(keys)}"
        return UserError(f"unknown config key {wrong!r}", hint)
    if match := re.search(r"Could not find '([^']+)'", text):
        group, _, option = match.group(1).rpartition("/")
        options = sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))
        return UserError(f"no config {option!r} in group {group or '/'!r}", nearest(option, options))
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return UserError(f"config key {match.group(1)!r} has no default", f"give it: {match.group(1)}=...")
    return UserError("config: " + " ".join(text.split()))


def _container(config: Any) -> Config:
    content = OmegaConf.to_container(config)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _keys(config: Config, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def instantiate(node: Config, *args: Any, allowed: Sequence[str] | None = None, **kwargs: Any) -> Any:
    """Call the class or function that `node["_target_"]` names with the node's other keys and the given arguments.

    Nested nodes with a `_target_` are instantiated first. allowed: module prefixes such as `raysys.` outside of which a
    target is refused (for configs that come with a bundle). An unknown argument is a `UserError` with the nearest one.
    """
    path = node.get("_target_")
    if not isinstance(path, str):
        raise UserError(f"a config node needs a _target_ that names a class, found keys {', '.join(node)}")
    target = locate(path, allowed)
    values = {key: _instantiate_nested(value, allowed) for key, value in node.items() if key != "_target_"} | kwargs
    parameters = inspect.signature(target).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in values:
            if key not in parameters:
                known = [name for name in parameters if name not in kwargs][len(args) :]
                raise UserError(f"{path} has no argument {key!r}", nearest(key, known))
    return target(*args, **values)


def _instantiate_nested(value: Any, allowed: Sequence[str] | None) -> Any:
    if isinstance(value, dict):
        if "_target_" in value:
            return instantiate(value, allowed=allowed)
        return {key: _instantiate_nested(item, allowed) for key, item in value.items()}
    if isinstance(value, list):
        return [_instantiate_nested(item, allowed) for item in value]
    return value


def locate(path: str, allowed: Sequence[str] | None = None) -> Callable[..., Any]:
    """The class or function of a dotted path; a `UserError` where it does not exist or stands outside `allowed`."""
    if allowed is not None and not any(path.startswith(prefix) for prefix in allowed):
        raise UserError(f"_target_ {path!r} is refused", f"allowed prefixes: {', '.join(allowed)}")
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"_target_ {path!r}: {error}", "is the package on PYTHONPATH?") from None
    if not callable(getattr(module, name, None)):
        callables = [key for key, value in vars(module).items() if inspect.isclass(value) or inspect.isfunction(value)]
        raise UserError(f"_target_ {path!r}: module {module_name!r} has no {name!r}", nearest(name, callables))
    return getattr(module, name)


def validate(kind: type[T], node: Config, where: str) -> T:
    """A settings dataclass from a config node; types are checked and unknown keys named with the nearest valid one."""
    try:
        return TypeAdapter(kind).validate_python(node)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([where, *(str(part) for part in first["loc"])])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = [found for found in _keys(TypeAdapter(kind).dump_python(kind())) if "." not in found]
            raise UserError(f"unknown config key {key!r}", nearest(str(first["loc"][-1]), known)) from None
        raise UserError(f"config key {key!r} is {first['input']!r}", first["msg"]) from None


def fingerprint(config: Config) -> str:
    """A hash of a resolved config, the same on every machine."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]


def run_job(main: Callable[[Config], None], name: str, description: str, argv: Sequence[str] | None = None) -> None:
    """Start a job: compose its config from the command line, call `main`, and end errors of the user in one line.

    Exit status: 0, 2 after a `UserError` (message and hint on stderr; `--debug` shows the traceback), 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(description=description, epilog="Config keys: group=option or key.path=value.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--config-dir", help="a folder with config groups of your own")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and do nothing")
    parser.add_argument("--show-config", action="store_true", help="print the resolved config and do nothing")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = compose(arguments.overrides, name, arguments.config_dir)
        if arguments.show_config:
            print(OmegaConf.to_yaml(config), end="")
            return
        main(config | {"dry_run": arguments.dry_run, "debug": arguments.debug})
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
