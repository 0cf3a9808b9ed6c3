"""Conversion of official DDF-ResNet checkpoints (theFoxofSky/ddfnet, timm's parameter names)."""

from __future__ import annotations

import argparse
import hashlib
import inspect
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ddf_mm.contrib.whole_files import whole_file
from ddf_mm.engine.checkpoints import load_from_local_file
from ddf_mm.engine.cli import UserError, phase
from ddf_mm.models import DDFResNet
from ddf_mm.version import __version__

COMBINES = ("mul", "add")
# Keys under which timm's and other training loops store weights.
_WEIGHTS = {"ema": ("state_dict_ema", "model_ema"), "model": ("state_dict", "model")}
_OFFICIAL_NAME = re.compile(r"ddf_(?P<combine>mul|add)_resnet\d+")


@dataclass(frozen=True)
class OfficialNetwork:
    """Weights of an official checkpoint and arguments of the network that they belong to."""

    weights: dict[str, Tensor]  # on the CPU; names of the classification head start with `fc.`
    averaged: bool  # whether they are the exponential moving average of the training
    arguments: dict[str, int | float]  # of DDFResNet, without `kernel_combine`
    architecture: str | None = None  # as the checkpoint names it, such as 'ddf_mul_resnet50'


def read_official(path: str, weights: str = "auto") -> OfficialNetwork:
    """Read an official checkpoint, a state dict or a training checkpoint; of the latter the weights
    ``'model'``, ``'ema'`` (exponential moving average) or ``'auto'`` (the average if there is one).
    Raises :class:`UserError` if the file has no such weights of a DDF-ResNet."""
    checkpoint = load_from_local_file(path, "cpu", more_types=(argparse.Namespace,))
    wanted = [weights] if weights != "auto" else list(_WEIGHTS)
    found = [
        (dict(checkpoint[name]), kind == "ema")
        for kind in wanted
        for name in _WEIGHTS[kind]
        if checkpoint.get(name) and isinstance(checkpoint[name], Mapping)
    ]
    if "model" in wanted and all(isinstance(value, Tensor) for value in checkpoint.values()):
        found.append((dict(checkpoint), False))
    if not found:
        names = " or ".join(repr(name) for kind in wanted for name in _WEIGHTS[kind])
        held = ", ".join(map(repr, list(checkpoint)[:10])) or "nothing"
        raise UserError(f"{path!r} lacks weights under {names}; it has {held}")
    state_dict, averaged = found[0]
    consume_prefix_in_state_dict_if_present(state_dict, "module.")
    if any(name.startswith("backbone.") for name in state_dict):
        raise UserError(
            f"{path!r} is not an official checkpoint: its parameter names start with 'backbone.'"
        )
    arguments = _arguments_of(state_dict, path)
    _require_equal_names(state_dict, arguments, path)
    architecture = checkpoint.get("arch") or getattr(checkpoint.get("args"), "model", None)
    return OfficialNetwork(state_dict, averaged, arguments, architecture)


def _arguments_of(state_dict: Mapping[str, Tensor], path: str) -> dict[str, int | float]:
    """The arguments of the DDFResNet that these weights belong to."""
    first = "layer1.0.conv2."
    try:
        stem_channels, in_channels = state_dict["conv1.weight"].shape[:2]
        maps, channels = state_dict[f"{first}spatial_branch.0.weight"].shape[:2]
        squeezed = state_dict[f"{first}channel_branch.1.weight"].shape[0]
        taps = state_dict[f"{first}channel_branch.3.weight"].shape[0] // channels
    except (KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path!r} is not the checkpoint of a DDF-ResNet: it lacks "
            f"{str(error).strip(chr(39))!r}; its first names are {', '.join(list(state_dict)[:3])}"
        ) from error
    blocks = tuple(
        len({n.split(".")[1] for n in state_dict if n.startswith(f"layer{stage}.")})
        for stage in range(1, 5)
    )
    depths = {settings: depth for depth, settings in DDFResNet.arch_settings.items()}
    if blocks not in depths:
        known = ", ".join(f"{depth}: {settings}" for settings, depth in depths.items())
        raise UserError(f"{path!r} has stages of {blocks} blocks; DDFResNet supports {known}")
    kernel_size = max(round(taps**0.5), 1)
    arguments: dict[str, int | float] = dict(
        depth=depths[blocks],
        in_channels=in_channels,
        stem_channels=stem_channels,
        base_channels=channels,
        kernel_size=kernel_size,
        head=maps // kernel_size**2,
    )
    if int(channels * 0.2) != squeezed:
        arguments["se_ratio"] = squeezed / channels
    return arguments


def _require_equal_names(
    state_dict: Mapping[str, Tensor], arguments: dict[str, int | float], path: str
) -> None:
    try:
        with torch.device("meta"):
            model = DDFResNet(**arguments)
            # A classification head may have any number of classes.
            if head := [value for name, value in state_dict.items() if name.startswith("fc.")]:
                model.fc = nn.Linear(model.layer4[0].conv3.out_channels, len(head[0]))
        model.load_state_dict(state_dict, assign=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path!r} does not fit the official DDF-ResNet{arguments['depth']}: {error}"
        ) from error


def combine_of_name(name: str | None) -> str | None:
    """``'mul'`` or ``'add'`` if an official name such as ``ddf_mul_resnet50`` has it, else None."""
    match = _OFFICIAL_NAME.search((name or "").replace("-", "_"))
    return match["combine"] if match else None


def find_combine(network: OfficialNetwork, name: str) -> tuple[str, str]:
    """The ``kernel_combine`` of an official checkpoint, and its source: the checkpoint or the
    file's ``name``. The weights of both modes have the same names and sizes."""
    told = {
        f"the checkpoint, {network.architecture!r}": combine_of_name(network.architecture),
        f"the file's name, {name!r}": combine_of_name(name),
    }
    told = {source: combine for source, combine in told.items() if combine}
    if len(set(told.values())) == 1:
        source, combine = next(iter(told.items()))
        return combine, source
    unknown = "neither the checkpoint nor the file's name has it"
    why = f"{' and '.join(told)}, disagree" if told else unknown
    raise UserError(f"--kernel-combine mul or add is needed: {why}", exit_code=2)


def require_config_fits(cfg: Config, network: OfficialNetwork, combine: str) -> None:
    """Raise :class:`UserError` if a config's backbone is not the network of a checkpoint."""
    backbone = dict((cfg.get("model") or {}).get("backbone") or {})
    kind = str(backbone.get("type")).rpartition(".")[2].strip("'<>")
    if kind != "DDFResNet":
        raise UserError(f"{cfg.filename} has the backbone {kind}, not DDFResNet", exit_code=2)
    defaults = {k: v.default for k, v in inspect.signature(DDFResNet).parameters.items()}
    defaults["stem_channels"] = backbone.get("base_channels", defaults["base_channels"])
    wanted = {"se_ratio": defaults["se_ratio"], **network.arguments, "kernel_combine": combine}
    for name, value in wanted.items():
        given = backbone.get(name, defaults[name])
        if given != value:
            raise UserError(
                f"{cfg.filename} has a backbone with {name}={given!r}, the checkpoint one with "
                f"{name}={value!r}",
                exit_code=2,
            )


def convert(network: OfficialNetwork, combine: str, backbone_only: bool = False) -> dict:
    """A checkpoint for mmengine, ``dict(state_dict=…, meta=…)``, with the parameter names of
    mmpretrain's ImageClassifier (``backbone.*``, ``head.fc.*``) or of DDFResNet alone."""
    state_dict = {}
    for name, value in network.weights.items():
        is_head = name.startswith("fc.")
        if not (backbone_only and is_head):
            prefix = "head." if is_head else "" if backbone_only else "backbone."
            state_dict[prefix + name] = value
    backbone = dict(type="DDFResNet", **network.arguments, kernel_combine=combine)
    meta = dict(ddf_mm_version=__version__, backbone=backbone, averaged=network.averaged)
    return dict(meta=meta, state_dict=state_dict)


def check_target(path: Path, overwrite: bool) -> None:
    """Raise UserError if the argument ``dst`` of a tool is no file that it may write."""
    if not path.parent.is_dir():
        raise UserError(f"dst {str(path)!r} is in a folder that does not exist", exit_code=2)
    if path.exists() and not overwrite:
        raise UserError(f"dst {str(path)!r} exists; --overwrite replaces it", exit_code=2)


def save(checkpoint: dict, path: Path, hash_in_name: bool = False) -> tuple[Path, str]:
    """Write a checkpoint atomically; return its path and its SHA-256 in hexadecimal.

    With ``hash_in_name`` the file ``name.pth`` becomes ``name-{hash8}.pth`` with the first eight
    digits of the SHA-256, which torch.hub and mmengine verify after a download.
    """
    # Written to memory first, because the file name may contain the digest.
    content = io.BytesIO()
    torch.save(checkpoint, content)
    digest = hashlib.sha256(content.getbuffer()).hexdigest()
    if hash_in_name:
        path = path.with_name(f"{path.stem}-{digest[:8]}{path.suffix}")
    with phase(f"writing {str(path)!r}"), whole_file(path) as part:
        part.write_bytes(content.getbuffer())
    return path, digest
