"""Compares the speed of the networks of configs."""

from __future__ import annotations

import argparse
import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ddf_mm import analysis
from ddf_mm.about import machine
from ddf_mm.benchmark.timing import (
    LAYOUTS,
    Call,
    in_fresh_process,
    new_figure,
    peak_extra_bytes,
    print_table,
    time_calls,
    track,
    write_json,
)
from ddf_mm.engine import launch
from ddf_mm.engine.cli import UserError
from ddf_mm.layers import DDFPack, switch_to_deploy


@dataclass(frozen=True)
class ModelSetting:
    """Settings common to all networks of a comparison."""

    mode: str
    precision: str
    layout: str
    batch_size: int
    shape: tuple[int, ...] | None

    def __str__(self) -> str:
        shape = "" if self.shape is None else f", {' x '.join(map(str, self.shape))}"
        return f"{self.mode}, {self.precision}, {self.layout}, batch {self.batch_size}{shape}"


@dataclass
class Network:
    """A config's network, ready to run."""

    call: Call
    parts: Callable[[], dict[str, Call]]  # makes the calls of the backbone and the neck
    shape: tuple[int, int]
    parameters: int
    gmac: float


class Skeleton(torch.nn.Module):
    """Replacement of a DDFPack without its cost: only the stride."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].contiguous() if self.stride > 1 else x


def make_skeleton(model: torch.nn.Module) -> None:
    """Replaces each DDFPack by an identity of the same stride."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, DDFPack):
                setattr(module, name, Skeleton(child.stride))


def fold_norms(model: torch.nn.Module) -> None:
    switch_to_deploy(model.eval())


# Columns of the table.
PARTS = ("backbone", "neck", "rest")
# Changes of a network, requested by +NAME after its config.
CHANGES = {"skeleton": make_skeleton, "folded": fold_norms}


def fix_proposals(model: torch.nn.Module) -> None:
    """Gives a two-stage detector the same proposals as every other one.

    With random weights, the number of proposals that survive the RPN's suppression is arbitrary,
    and decides the time of the RoI head. Instead there are always as many as the config allows, of
    16 pixels to the size of the image. Their selection is not timed.
    """
    for head in getattr(model, "rpn_head", torch.nn.Module()).modules():
        if hasattr(head, "predict_by_feat"):

            def predict(
                scores: list[Tensor],
                *outputs: Any,
                batch_img_metas: list[dict],
                cfg: Any = None,
                head: Any = head,
                **options: Any,
            ) -> list[InstanceData]:
                count = (cfg or head.test_cfg).max_per_img
                device = scores[0].device
                return [proposals(meta["img_shape"], count, device) for meta in batch_img_metas]

            head.predict_by_feat = predict


def proposals(image: tuple[int, int], count: int, device: torch.device) -> InstanceData:
    """Boxes whose areas and aspect ratios are uniform in their logarithms."""
    height, width, *_ = image
    area, aspect, x, y, score = torch.rand(5, count, generator=torch.Generator().manual_seed(0))
    side = 16 * (max(height * width, 257) ** 0.5 / 16) ** area
    half_width, half_height = side * 2 ** (aspect - 0.5) / 2, side / 2 ** (aspect - 0.5) / 2
    x, y = x * width, y * height
    boxes = torch.stack([x - half_width, y - half_height, x + half_width, y + half_height], 1)
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    labels = torch.zeros(count, dtype=torch.long)
    return InstanceData(bboxes=boxes, scores=score, labels=labels).to(device)


def part_calls(
    model: torch.nn.Module, call: Call, context: Callable[[], AbstractContextManager], train: bool
) -> dict[str, Call]:
    """Calls of the backbone and the neck alone, with the inputs that they have in ``call``.

    In training with the backward pass, from gradients of ones.
    """
    inputs: dict[str, tuple] = {}
    parts = {name: getattr(model, name, None) for name in ("backbone", "neck")}
    parts = {name: part for name, part in parts.items() if part is not None}

    def record(name: str, module: object, args: tuple, kwargs: dict) -> None:
        inputs.setdefault(name, tree_map_only(Tensor, leaf, (args, kwargs)))

    def leaf(x: Tensor) -> Tensor:  # where the backward pass of a part ends
        return x.detach().requires_grad_(x.requires_grad)

    hooks = [
        part.register_forward_pre_hook(functools.partial(record, name), with_kwargs=True)
        for name, part in parts.items()
    ]
    call()
    for hook in hooks:
        hook.remove()

    def run(part: torch.nn.Module, args: tuple, kwargs: dict) -> object:
        with context():
            outputs = part(*args, **kwargs)
        if not train:
            return outputs
        part.zero_grad()
        outputs = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(x) for x in outputs])
        return None

    return {name: functools.partial(run, parts[name], *inputs[name]) for name in inputs}


def split_changes(name: str) -> tuple[str, list[str]]:
    """Splits ``config+change+…`` into the config and the changes.

    Raises:
        UserError: an unknown change.
    """
    config, *changes = name.split("+")
    for change in changes:
        if change not in CHANGES:
            known = " and ".join(f"+{known}" for known in CHANGES)
            raise UserError(
                f"config {name!r}: unknown change +{change}; known are {known}", exit_code=2
            )
    return config, changes


def make_network(name: str, setting: ModelSetting, args: argparse.Namespace) -> Network:
    """Builds the network of a config and a call to time."""
    config, changes = split_changes(name)
    cfg = analysis.read_config(config, args.cfg_options)
    shape = analysis.image_shape(cfg, setting.shape)
    analysis.fit_to(cfg, shape)
    torch.manual_seed(0)
    model = analysis.build_model(cfg)
    model.init_weights()
    fix_proposals(model)
    for change in changes:
        CHANGES[change](model)
    # Counted for one image on the CPU, where the compiled ops are available.
    cost = analysis.count(model, analysis.example_batch(cfg, 1, shape))
    model = model.to(args.device, memory_format=LAYOUTS[setting.layout])
    batch = analysis.example_batch(cfg, setting.batch_size, shape)
    if args.compile:
        # Like mmengine's Runner.
        model.forward = torch.compile(model.forward)

    if setting.mode == "train":
        model.train()
        wrapper = cfg.get("optim_wrapper") or dict(optimizer=dict(type="SGD", lr=0.1))
        of_amp = ("loss_scale", "dtype", "use_fsdp")
        cfg.optim_wrapper = {name: value for name, value in wrapper.items() if name not in of_amp}
        cfg.optim_wrapper.type = "OptimWrapper"
        if setting.precision == "amp":
            launch.enable_amp(cfg)
        launch.adapt_to_device(cfg)
        optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        for group in optim_wrapper.param_groups:
            group["lr"] = 0.0  # so that every step computes the same

        def call() -> None:
            model.train_step(dict(batch), optim_wrapper)

        def context() -> AbstractContextManager:
            return optim_wrapper.optim_context(model)

    else:
        inputs, samples = analysis.preprocessed(model, batch)
        inputs = inputs.contiguous(memory_format=LAYOUTS[setting.layout])
        amp = setting.precision == "amp"
        dtype = torch.float16 if args.device == "cuda" else torch.bfloat16

        @contextmanager
        def context() -> Iterator[None]:
            with torch.no_grad(), torch.autocast(args.device, dtype, enabled=amp):
                yield

        def call() -> object:
            with context():
                return model(inputs, samples, mode="tensor")

    parts = functools.partial(part_calls, model, call, context, setting.mode == "train")
    if args.compile:  # what is compiled together is not timed apart
        parts = dict
    return Network(call, parts, shape, cost.parameters, cost.total / 1e9)


def quiet_libraries() -> None:
    """Suppresses logs and warnings of the toolboxes, which would interrupt the tables."""
    MMLogger.get_instance("mmengine").setLevel("ERROR")
    warnings.filterwarnings("ignore")


def model_peaks(settings: list[ModelSetting], args: argparse.Namespace) -> Iterator[dict[str, int]]:
    """Peak extra memory in bytes of each network, for each setting."""
    torch.set_num_threads(args.threads)
    quiet_libraries()
    for setting in settings:
        extra = {}
        for name in args.configs:
            call = make_network(name, setting, args).call
            for _ in range(2):  # the first call allocates persistent state, such as momentum
                call()
            extra[name] = peak_extra_bytes(call, args.device)
        yield extra


def measure_models(setting: ModelSetting, args: argparse.Namespace) -> list[dict[str, object]]:
    """Measures the networks; one row of the report for each."""
    networks = {name: make_network(name, setting, args) for name in args.configs}
    calls = {(name, "all"): network.call for name, network in networks.items()}
    for name, network in networks.items():
        calls |= {(name, part): call for part, call in network.parts().items()}
    times = time_calls(calls, args.repeats, args.device, cached=False)
    return [
        {
            "config": name,
            **asdict(setting),
            "shape": network.shape,
            "parameters": network.parameters,
            "gmac": network.gmac,
            "milliseconds": asdict(times[name, "all"]),
            "parts": {p: asdict(times[name, p]) for p in PARTS if (name, p) in times},
            "images_per_s": 1e3 * setting.batch_size / times[name, "all"].median,
            # Relative to the network of the first config.
            "speed": times[args.configs[0], "all"].least / times[name, "all"].least,
        }
        for name, network in networks.items()
    ]


def model_table(setting: ModelSetting, rows: list[dict], labels: list[str]) -> list[list[str]]:
    head = ["M params", "GMAC", "ms", "least ms", *PARTS, "images/s", "MB", "speed"]
    table = [[str(setting), "image", *head]]
    for label, row in zip(labels, rows, strict=True):
        times = row["milliseconds"]
        size = row.get("peak_extra_bytes")
        parts = {part: least["least"] for part, least in row["parts"].items()}
        parts["rest"] = times["least"] - sum(parts.values())
        table.append(
            [
                label,
                "x".join(map(str, row["shape"])),
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['gmac']:.3g}",
                f"{times['median']:.1f}",
                f"{times['least']:.1f}",
                *(f"{parts[part]:.1f}" if part in parts else "" for part in PARTS),
                f"{row['images_per_s']:.2f}",
                "" if size is None else f"{size / 1e6:.0f}",
                f"{row['speed']:.2f}",
            ]
        )
    return table


def plot_models(
    groups: dict[ModelSetting, list[dict]], labels: list[str], title: str, path: Path
) -> None:
    """Draws the median and minimum times of the networks, one panel for each setting."""
    figure, axes = new_figure(len(groups), 0.8 + 0.4 * len(labels))
    for axis, (setting, rows) in zip(axes, groups.items(), strict=True):
        times = [row["milliseconds"] for row in rows]
        places = range(len(rows))
        bars = axis.barh(places, [t["median"] for t in times], 0.6, label="median")
        axis.bar_label(bars, [f"{t['median']:.1f}" for t in times], fontsize=8, padding=3)
        least = [t["least"] for t in times]
        axis.plot(least, places, "|", color="black", markersize=14, label="least")
        axis.set_yticks(places, labels)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set_xlabel("ms")
        axis.set_title(str(setting), fontsize=10)
    axes[0].legend(ncols=2, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def benchmark_models(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    quiet_libraries()
    args.configs = list(dict.fromkeys(args.configs))
    for name in args.configs:  # so that a wrong config fails before minutes of measurements
        config, changes = split_changes(name)
        if "folded" in changes and "train" in args.mode:
            raise UserError(f"config {name!r} has no norms to train: omit --mode train")
        analysis.read_config(config, args.cfg_options)
    settings = [
        ModelSetting(*values)
        for values in itertools.product(
            args.mode, args.precision, args.layout, args.batch_size, args.shape or [None]
        )
    ]
    about = machine(args.device, args.threads)
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    groups = {setting: measure_models(setting, args) for setting in track(settings)}
    if not args.no_memory:
        extra = in_fresh_process(model_peaks, settings, args)
        for rows, sizes in zip(groups.values(), extra, strict=False):
            for row in rows:
                row["peak_extra_bytes"] = sizes[row["config"]]
    labels = analysis.config_labels(args.configs)
    for setting, rows in groups.items():
        print_table(model_table(setting, rows, labels))
        print()
    print(
        "ms: median and least of all runs; GMAC: of one image; MB: peak memory besides the "
        "weights; speed: least time of the first config over the least of this; backbone, neck, "
        "rest: of the least ms, measured alone, and what remains"
    )
    write_json(args, about, [row for rows in groups.values() for row in rows])
    if args.plot:
        title = f"{about['processor']}, torch {about['torch']}"
        plot_models(groups, labels, title, args.plot)
