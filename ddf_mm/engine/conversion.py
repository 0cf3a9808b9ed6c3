"""Official DDF-ResNet checkpoints (theFoxofSky/ddfnet, in timm's names) under this package's."""

from __future__ import annotations

import argparse
import hashlib
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
from ddf_mm.engine.cli import UserError, summarize
from ddf_mm.models import DDFResNet
from ddf_mm.models.ddf_resnet import DDFBottleneck
from ddf_mm.version import __version__

COMBINES = ("mul", "add")
# The names under which timm's and other training loops keep weights, the averaged ones last.
_WEIGHTS = {"model": ("state_dict", "model"), "ema": ("state_dict_ema", "model_ema")}
_OFFICIAL_NAME = re.compile(r"ddf_(?P<combine>mul|add)_resnet\d+")
_SHOWN_NAMES = 10
# How much better the statistics of one combination must fit than the other's, as a ratio.
_CLEAR = 1.5


@dataclass(frozen=True)
class OfficialNetwork:
    """An official checkpoint's weights, and the network that they belong to.

    Args:
        weights: Names of the official network to tensors, on the CPU.
        averaged: Whether they are the exponential moving average of the training.
        arguments: The :class:`~ddf_mm.models.DDFResNet` that takes them, but ``kernel_combine``.
        architecture: What the checkpoint says of its network, as ``'ddf_mul_resnet50'``.
    """

    weights: dict[str, Tensor]
    averaged: bool
    arguments: dict[str, int | float]
    architecture: str | None = None

    @property
    def head(self) -> dict[str, Tensor]:
        """The classifier's weights; empty if there is none."""
        return {name: value for name, value in self.weights.items() if name.startswith("fc.")}

    @property
    def backbone(self) -> dict[str, Tensor]:
        """All weights but the head's."""
        return {name: value for name, value in self.weights.items() if not name.startswith("fc.")}

    def build(self, kernel_combine: str) -> DDFResNet:
        """The backbone with these weights, in evaluation mode."""
        with torch.device("meta"):
            model = DDFResNet(**self.arguments, kernel_combine=kernel_combine)
        model.load_state_dict(self.backbone, assign=True)
        return model.eval()


def read_official(path: str, weights: str = "auto") -> OfficialNetwork:
    """Read an official checkpoint: a state dict, or a training checkpoint that holds some.

    Only tensors, numbers, strings and the options of the training (an ``argparse.Namespace``) are
    read; a file that would run code is refused.

    Args:
        path: The checkpoint.
        weights: ``'model'``, ``'ema'`` (the exponential moving average), or ``'auto'``: the
            average where there is one.

    Raises:
        UserError: If it cannot be read, if it lacks those weights, or if they are not those of a
            DDF-ResNet; then with the names that are missing, unexpected or of another size.
    """
    checkpoint = load_from_local_file(path, "cpu", more_types=(argparse.Namespace,))
    state_dict, averaged = _choose_weights(checkpoint, path, weights)
    state_dict = dict(state_dict)
    consume_prefix_in_state_dict_if_present(state_dict, "module.")
    if any(name.startswith("backbone.") for name in state_dict):
        raise UserError(f"{path!r} is no official checkpoint: its names start with 'backbone.'")
    arguments = _arguments_of(state_dict, path)
    _require_equal_names(state_dict, arguments, path)
    options = checkpoint.get("args")
    architecture = checkpoint.get("arch") or getattr(options, "model", None)
    return OfficialNetwork(state_dict, averaged, arguments, architecture)


def _choose_weights(
    checkpoint: Mapping, path: str, weights: str
) -> tuple[Mapping[str, Tensor], bool]:
    found = {
        kind: checkpoint[name]
        for kind, names in _WEIGHTS.items()
        for name in names
        if isinstance(checkpoint.get(name), Mapping)
    }
    if not found and all(isinstance(value, Tensor) for value in checkpoint.values()):
        found = {"model": checkpoint}
    wanted = [weights] if weights != "auto" else ["ema", "model"]
    for kind in wanted:
        if found.get(kind):
            return found[kind], kind == "ema"
    names = " or ".join(repr(name) for kind in wanted for name in _WEIGHTS[kind])
    held = ", ".join(map(repr, list(checkpoint)[:_SHOWN_NAMES])) or "nothing"
    raise UserError(f"{path!r} lacks weights under {names}; it holds {held}")


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
            f"{path!r} holds no DDF-ResNet: it lacks {str(error).strip(chr(39))!r}; its names "
            f"start with {', '.join(list(state_dict)[:3])}"
        ) from error
    blocks = tuple(
        len({n.split(".")[1] for n in state_dict if n.startswith(f"layer{stage}.")})
        for stage in range(1, 5)
    )
    depths = {settings: depth for depth, settings in DDFResNet.arch_settings.items()}
    if blocks not in depths:
        known = ", ".join(f"{depth}: {settings}" for settings, depth in depths.items())
        raise UserError(f"{path!r} has stages of {blocks} blocks; DDFResNet knows {known}")
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
            expected = DDFResNet(**arguments).state_dict()
    except ValueError as error:
        raise UserError(f"{path!r} holds no DDF-ResNet: {error}") from error
    outputs = expected["layer4.0.conv3.weight"].shape[0]
    sizes = {name: value.shape for name, value in expected.items()}
    # A head, if there is one, has as many classes as it likes.
    head = [name for name in state_dict if name.startswith("fc.")]
    if head:
        classes = state_dict[head[0]].shape[0]
        sizes |= {"fc.weight": (classes, outputs), "fc.bias": (classes,)}
    problems = {
        "missing": [name for name in sizes if name not in state_dict],
        "unexpected": [name for name in state_dict if name not in sizes],
        "of another size": [
            f"{name} {tuple(value.shape)} instead of {tuple(sizes[name])}"
            for name, value in state_dict.items()
            if name in sizes and tuple(value.shape) != tuple(sizes[name])
        ],
    }
    if told := summarize(problems, _SHOWN_NAMES):
        depth = arguments["depth"]
        raise UserError(f"{path!r} does not fit the official DDF-ResNet{depth}: {told}")


def combine_of_name(name: str | None) -> str | None:
    """``'mul'`` or ``'add'`` as an official name like ``ddf_mul_resnet50`` has it, else None."""
    match = _OFFICIAL_NAME.search((name or "").replace("-", "_"))
    return match["combine"] if match else None


def _natural_images(batch: int, channels: int, size: int) -> Tensor:
    """Noise with the spectrum of natural images, whose amplitude falls with the frequency;
    mean 0 and variance 1. The same at every call."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.fft.fftfreq(size)
    radius = (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt()
    radius[0, 0] = torch.inf
    # The channels of a photograph are mostly the same.
    shared = torch.randn(batch, 1, size, size, generator=generator)
    own = torch.randn(batch, channels, size, size, generator=generator)
    spectrum = torch.fft.fft2(shared + 0.3 * own) / radius
    images = torch.fft.ifft2(spectrum).real
    return (images - images.mean()) / images.std()


def misfit_of_statistics(network: OfficialNetwork, size: int = 160) -> dict[str, float]:
    """How badly each combination explains the batch statistics that the weights come with.

    The checkpoints of ``mul`` and ``add`` networks have the same names and shapes. But the norm
    after each dynamic filter has recorded the variances of its input in training; here noise with
    the spectrum of photographs goes through the network with either combination.

    Args:
        network: The weights.
        size: Height and width of the noise images, in pixels.

    Returns:
        For ``'mul'`` and ``'add'`` the mean absolute logarithm of the variance over the recorded
        one, over all channels of the norms after dynamic filters in the first two stages.
    """
    images = _natural_images(4, int(network.arguments["in_channels"]), size)
    misfits = {}
    for combine in COMBINES:
        model = network.build(combine)
        found: list[Tensor] = []

        def record(norm: nn.Module, inputs: tuple[Tensor], found: list[Tensor] = found) -> None:
            variance = inputs[0].var((0, 2, 3))
            small = 1e-6 * norm.running_var.mean() + 1e-12
            found.append(((variance + small) / (norm.running_var + small)).log().abs())

        for stage in (model.layer1, model.layer2):
            for block in stage:
                if isinstance(block, DDFBottleneck):
                    block.norm2.register_forward_pre_hook(record)
        with torch.inference_mode():
            model(images)
        misfits[combine] = torch.cat(found).nan_to_num(torch.inf).mean().item()
    return misfits


def find_combine(network: OfficialNetwork, name: str) -> tuple[str, str]:
    """Which combination an official checkpoint was trained with, and what says so.

    Args:
        network: The weights.
        name: The file's name.

    Raises:
        UserError: If nothing says so clearly, or if the checkpoint and the file's name disagree.
    """
    told = {
        f"the checkpoint, {network.architecture!r}": combine_of_name(network.architecture),
        f"the file's name, {name!r}": combine_of_name(name),
    }
    told = {source: combine for source, combine in told.items() if combine}
    if len(set(told.values())) > 1:
        raise UserError(f"--kernel-combine is needed: {' and '.join(told)}, disagree")
    if told:
        source, combine = next(iter(told.items()))
        return combine, source
    unknown = (
        "--kernel-combine is needed: neither the checkpoint nor the file's name tells mul from add"
    )
    if not network.weights["layer1.0.bn2.num_batches_tracked"] > 0:
        raise UserError(f"{unknown}, and its batch norms have seen no batch")
    misfits = misfit_of_statistics(network)
    best, other = sorted(COMBINES, key=misfits.__getitem__)
    values = ", ".join(f"{combine} {misfits[combine]:.2f}" for combine in COMBINES)
    if not misfits[other] > _CLEAR * misfits[best]:
        raise UserError(f"{unknown}, and the batch statistics fit both alike (misfit {values})")
    return best, f"the batch statistics of the norms (misfit {values})"


def require_config_fits(cfg: Config, network: OfficialNetwork, combine: str) -> None:
    """Check that a config's backbone is the network of a checkpoint.

    Raises:
        UserError: If it has no DDFResNet, or one with other arguments.
    """
    backbone = dict((cfg.get("model") or {}).get("backbone") or {})
    kind = str(backbone.get("type")).rpartition(".")[2].strip("'<>")
    if kind != "DDFResNet":
        raise UserError(f"{cfg.filename} has the backbone {kind}, not DDFResNet", exit_code=2)
    defaults = dict(in_channels=3, base_channels=64, kernel_size=3, head=1, se_ratio=0.2)
    defaults |= dict(kernel_combine="mul", stem_channels=backbone.get("base_channels", 64))
    wanted = {**network.arguments, "kernel_combine": combine}
    wanted.setdefault("se_ratio", 0.2)
    for name, value in wanted.items():
        given = backbone.get(name, defaults.get(name))
        if given != value:
            raise UserError(
                f"{cfg.filename} has a backbone with {name}={given!r}, the checkpoint one with "
                f"{name}={value!r}",
                exit_code=2,
            )


def convert(network: OfficialNetwork, combine: str, backbone_only: bool = False) -> dict:
    """The checkpoint that mmengine loads.

    Args:
        network: The official weights.
        combine: ``'mul'`` or ``'add'``; written into ``meta``.
        backbone_only: Leave out the head, and the prefix ``backbone.`` of the names.

    Returns:
        ``dict(state_dict=…, meta=…)``: the names of mmpretrain's ImageClassifier (``backbone.*``,
        ``head.fc.*``), or of DDFResNet alone.
    """
    prefix = "" if backbone_only else "backbone."
    state_dict = {prefix + name: value for name, value in network.backbone.items()}
    if not backbone_only:
        state_dict |= {f"head.{name}": value for name, value in network.head.items()}
    backbone = dict(type="DDFResNet", **network.arguments, kernel_combine=combine)
    meta = dict(ddf_mm_version=__version__, backbone=backbone, averaged=network.averaged)
    return dict(meta=meta, state_dict=state_dict)


def save(checkpoint: dict, path: Path, hash_in_name: bool = False) -> tuple[Path, str]:
    """Write a checkpoint, whole or not at all.

    Args:
        checkpoint: What to write.
        path: Where.
        hash_in_name: Write ``name-{hash8}.pth`` in place of ``name.pth``, with the first eight
            digits of the file's sha256, as torch.hub and mmengine check when they download.

    Returns:
        The path and the sha256 in hexadecimal.
    """
    # In memory first, since the name may hold its digest.
    content = io.BytesIO()
    torch.save(checkpoint, content)
    digest = hashlib.sha256(content.getbuffer()).hexdigest()
    if hash_in_name:
        path = path.with_name(f"{path.stem}-{digest[:8]}{path.suffix}")
    with whole_file(path) as part:
        part.write_bytes(content.getbuffer())
    return path, digest
