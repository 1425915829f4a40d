"""The model of a plan: named on the command line, built without memory."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from powertrain.errors import ShardingError
from powertrain.text import did_you_mean, some

FORMS = (
    "package.module:callable, path/to/file.py:callable, or a Hugging Face configuration (its directory or config.json)"
)


def build_model(spec: str, arguments: Mapping[str, Any]) -> torch.nn.Module:
    """Build a model on the meta device, whatever it is larger than.

    Args:
        spec: ``package.module:callable``, ``file.py:callable``, or the directory or file of a Hugging Face
            configuration.
        arguments: keyword arguments of the callable; values that replace those of a Hugging Face configuration.

    Raises:
        ShardingError: there is no such model, or it cannot be built without memory.
    """
    make, what = _hugging_face(spec, arguments) if _is_hugging_face(spec) else (_callable(spec, arguments), spec)
    try:
        with torch.device("meta"), _NoValues():
            model = make()
    except Exception as error:
        raise ShardingError(
            f"{what} cannot be built on the meta device",
            where="--model",
            found=f"{type(error).__name__}: {str(error).strip()[:300]}",
            remedy="check --model-args; a constructor that looks at values of tensors (.item(), numpy) or loads "
            "weights needs a way around that",
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise ShardingError(
            f"{what} is no model",
            where="--model",
            expected="a callable that returns a torch.nn.Module",
            found=type(model).__name__,
            remedy="name the model's class, or a function that makes it",
        )
    real = [name for name, param in model.named_parameters() if not param.is_meta]
    return model.to("meta") if real else model


class _NoValues(TorchFunctionMode):
    """Leaves out what only gives values to tensors: on the meta device they have none, but torch takes its time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return the tensor as it is where only its values would change."""
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # so torch's initialisers call it
        fills = getattr(func, "__name__", "") in _FILLS and isinstance(tensor, torch.Tensor) and tensor.is_meta
        return tensor if fills else func(*args, **kwargs)


_FILLS = frozenset(
    (
        *("normal_", "uniform_", "fill_", "zero_", "exponential_", "bernoulli_", "erfinv_", "clamp_", "mul_", "add_"),
        *("constant_", "ones_", "zeros_", "trunc_normal_", "orthogonal_", "kaiming_uniform_", "kaiming_normal_"),
        *("xavier_uniform_", "xavier_normal_"),
    )
)
"""Methods of tensors, and initialisers of torch, that change the values of one tensor, and nothing else."""


def _is_hugging_face(spec: str) -> bool:
    path = Path(spec)
    return path.is_dir() or (path.suffix == ".json" and ":" not in path.name)


def _hugging_face(spec: str, arguments: Mapping[str, Any]) -> tuple[Callable[[], Any], str]:
    path = Path(spec)
    file = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ShardingError(
            f"{file} holds no Hugging Face configuration",
            where="--model",
            expected=FORMS,
            found=str(error),
            remedy="give the directory of a model, or its config.json",
        ) from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ShardingError(
            f"{file} does not say which model it describes",
            where="--model",
            expected='a JSON object with "model_type"',
            found=some(list(content), 8) if isinstance(content, dict) else type(content).__name__,
            remedy="give the config.json of a Hugging Face model",
        )
    try:
        import transformers
    except ImportError as error:
        raise ShardingError(
            f"{file} is a Hugging Face configuration, and transformers is not installed",
            where="--model",
            found=str(error),
            remedy="pip install transformers, or name a callable: package.module:callable",
        ) from error

    def make() -> Any:
        kind = content.pop("model_type")
        for key in ("quantization_config", "dtype", "torch_dtype"):
            content.pop(key, None)  # formats are what [precision] says
        config = transformers.AutoConfig.for_model(kind, **{**content, **arguments})
        # A configuration that was saved with a model says of which class it was.
        architectures = [getattr(transformers, name, None) for name in config.architectures or ()]
        kinds = [architecture for architecture in architectures if architecture is not None]
        return kinds[0](config) if kinds else transformers.AutoModelForCausalLM.from_config(config)

    return make, str(file)


def _callable(spec: str, arguments: Mapping[str, Any]) -> Callable[[], Any]:
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        near = [file.name for file in Path().glob("*.py")]
        here = f"files here: {some(sorted(near), 6)}" if near else "no such file or directory"
        raise ShardingError(
            f"--model {spec!r} names no model",
            where="--model",
            expected=FORMS,
            found=here,
            remedy=f"write {spec}:Name, with the class or function that makes the model",
        )
    module = _from_file(Path(place), spec) if place.endswith(".py") else _from_import(place, spec)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            raise ShardingError(
                f"{place} has no {part!r}{did_you_mean(part, public)}",
                where="--model",
                expected=f"one of {some(public) or 'nothing that could be called'}",
                found=spec,
                remedy="name the class or function that makes the model",
            )
        found = getattr(found, part)
    if not callable(found):
        raise ShardingError(
            f"{spec} cannot be called",
            where="--model",
            expected="a class or function that makes the model",
            found=type(found).__name__,
            remedy="name what makes the model",
        )
    return lambda: found(**arguments)


def _from_file(path: Path, spec: str) -> Any:
    if not path.is_file():
        folder = path.parent
        there = sorted(file.name for file in folder.glob("*.py")) if folder.is_dir() else []
        raise ShardingError(
            f"there is no file {path}{did_you_mean(path.name, there)}",
            where="--model",
            expected=FORMS,
            found=f"tried {path.absolute()}" + (f"; there are {some(there, 6)}" if there else ""),
            remedy="check the path; it is relative to the working directory",
        )
    name = f"powertrain_plan_{path.stem}"
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None and loader.loader is not None
    module = importlib.util.module_from_spec(loader)
    sys.modules[name] = module  # dataclasses look for their module there
    sys.path.insert(0, str(path.parent.absolute()))  # as for a script: its neighbours can be imported
    try:
        loader.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise _does_not_import(str(path), error, spec) from error
    finally:
        sys.path.remove(str(path.parent.absolute()))
    return module


def _from_import(place: str, spec: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)  # as `python -m` does it
    try:
        return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise _does_not_import(place, error, spec) from error
    finally:
        sys.path.remove(here)


def _does_not_import(place: str, error: BaseException, spec: str) -> ShardingError:
    file = Path(place.replace(".", "/") + ".py")
    hint = f"; {file} is there: write {file}:{spec.rpartition(':')[2]}" if file.is_file() else ""
    return ShardingError(
        f"{place} cannot be imported",
        where="--model",
        expected=FORMS,
        found=f"{type(error).__name__}: {error}",
        remedy="install the package, start in the directory that holds it, or give the file's path" + hint,
    )
