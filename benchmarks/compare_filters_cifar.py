#!/usr/bin/env python3
"""Train a narrow ResNet-26 on CIFAR-10 with different filters in place of its 3x3 convolutions.

DATA has the images as files, DATA/train/CLASS/* and DATA/test/CLASS/*. All networks of a seed see
the same batches. Trainings whose results are in --out are not run again; the table is written
beside it, as Markdown."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.logging import MMLogger
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from ddf_mm.contrib.memory import keep_memory
from ddf_mm.engine import cli
from ddf_mm.layers import DDFPack
from ddf_mm.models import DDFResNet_CIFAR

CLASSES = 10
BATCH = 128


class Depthwise(nn.Conv2d):
    """A depthwise convolution with the signature of an ordinary one."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs: object) -> None:
        super().__init__(in_channels, out_channels, groups=in_channels, **kwargs)


ORDINARY = dict(stage_with_ddf=(False,) * 4)
# Name in the table and arguments of the backbone.
FILTERS = {
    "ordinary": ("ordinary 3x3", ORDINARY),
    "depthwise": (
        "static depthwise 3x3",
        dict(ORDINARY, dcn=dict(type=Depthwise), stage_with_dcn=(True,) * 4),
    ),
    "involution": ("involution 3x3", dict(involution=dict(kernel_size=3))),
    "mul": ("DDF, mul", {}),
    "add": ("DDF, add", dict(kernel_combine="add")),
    "channel": ("DDF, channel filters only", {}),
    "spatial": ("DDF, spatial filters only", {}),
    "mean": ("DDF, mul, filters plus a learned constant", {}),
}


class Classifier(nn.Module):
    """The network with the filters ``FILTERS[name]``; its first stage has half the image's rows."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        _, options = FILTERS[name]
        self.backbone = DDFResNet_CIFAR(26, base_channels=width, strides=(2, 2, 2, 2), **options)
        self.backbone.init_weights()
        self.head = nn.Linear(32 * width, CLASSES)
        for pack in [module for module in self.modules() if isinstance(module, DDFPack)]:
            if name in ("channel", "spatial"):
                delattr(pack, f"{'spatial' if name == 'channel' else 'channel'}_branch")
                pack.generate_filters = _only(pack, name)
            elif name == "mean":
                _add_means(pack)

    def forward(self, images: Tensor) -> Tensor:
        (features,) = self.backbone(images)
        return self.head(features.mean((2, 3)))


def _only(pack: DDFPack, name: str):
    """A :meth:`DDFPack.generate_filters` of one of the two filters."""
    if name == "spatial":
        return lambda x: (None, pack.spatial_branch(x))
    shape = -1, pack.in_channels, pack.kernel_size, pack.kernel_size
    return lambda x: (pack.channel_branch(x).reshape(shape), None)


def _add_means(pack: DDFPack) -> None:
    """Adds a learned constant per tap to the filters, at first 1 for spatial ones."""
    for norm in (pack.spatial_branch[-1], pack.channel_branch[-1]):
        norm.running_mean = True
        norm.mean = nn.Parameter(torch.empty(norm.in_channels * norm.kernel_size**2))
        if norm.filter_type == "spatial":
            nn.init.ones_(norm.mean)
        else:
            nn.init.normal_(norm.mean, std=norm.scale)


def load(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """``count`` images, the first of each class, ``Tensor[N, 3, 32, 32]``, standardized, and their
    labels."""
    data = ImageFolder(folder)
    labels = torch.tensor(data.targets)
    kept = torch.cat([(labels == c).nonzero()[: count // CLASSES, 0] for c in range(CLASSES)])
    images = torch.stack([pil_to_tensor(data[i][0]) for i in kept.tolist()]).float()
    mean, std = torch.tensor([[125.3, 123.0, 113.9], [63.0, 62.1, 66.7]])[..., None, None]
    return (images - mean) / std, labels[kept]


def augment(images: Tensor) -> Tensor:
    """Mirrors half of the images, and shifts each by up to four pixels."""
    mirrored = images.flip(3).where(torch.rand(len(images), 1, 1, 1) < 0.5, images)
    padded = F.pad(mirrored, (4,) * 4)
    offsets = torch.randint(9, (len(images), 2)).tolist()
    shifted = [
        image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, offsets, strict=True)
    ]
    return torch.stack(shifted).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of correct predictions."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    return 100 * right / len(labels)


def train(
    name: str,
    seed: int,
    args: argparse.Namespace,
    train_data: tuple[Tensor, Tensor],
    test_data: tuple[Tensor, Tensor],
) -> dict[str, float]:
    """Test accuracy, loss of the last epoch and CPU seconds of a training."""
    torch.manual_seed(seed)
    model = Classifier(name, args.width).to(memory_format=torch.channels_last)
    torch.manual_seed(seed)
    images, labels = train_data
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        args.lr,
        epochs=args.epochs,
        steps_per_epoch=-(-len(images) // BATCH),
        cycle_momentum=False,
    )
    start = time.process_time()
    for _ in range(args.epochs):
        model.train()
        losses = []
        for batch in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(augment(images[batch])), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    seconds = time.process_time() - start
    return dict(
        accuracy=accuracy(model, *test_data), loss=statistics.mean(losses), cpu_seconds=seconds
    )


def size(name: str, width: int) -> dict[str, float]:
    """Parameters and multiply-adds per image, in millions."""
    model = Classifier(name, width).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    return dict(
        params=sum(p.numel() for p in model.parameters()) / 1e6,
        multiply_adds=counter.get_total_flops() / 2e6,
    )


def tabulate(results: dict[str, dict], width: int) -> str:
    """A Markdown table of finished trainings: mean and standard deviation over the seeds."""
    lines = [
        "| filters | parameters, M | multiply-adds, M | seeds | test accuracy, % | training loss |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, (title, _) in FILTERS.items():
        runs = list(results.get(name, {}).values())
        if not runs:
            continue
        cost = size(name, width)
        cells = [title, f"{cost['params']:.2f}", f"{cost['multiply_adds']:.1f}", str(len(runs))]
        for key, digits in (("accuracy", 1), ("loss", 2)):
            values = [run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="compare_filters_cifar.py", description=__doc__)
    parser.add_argument("data", type=Path, help="folder of the images")
    parser.add_argument("--out", type=Path, default=Path("work_dirs/filters_cifar.json"))
    parser.add_argument("--filters", nargs="+", choices=FILTERS, default=list(FILTERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--images", type=int, default=10000, help="training images; default: 10000")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=0.4, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    return parser.parse_args()


def main() -> None:
    """Run the missing trainings and write the table."""
    args = parse_args()
    MMLogger.get_instance("mmengine", log_level="ERROR")
    keep_memory()
    settings = {
        key: getattr(args, key) for key in ("width", "images", "epochs", "lr", "weight_decay")
    }
    report = dict(settings=settings, results={})
    if args.out.is_file():
        report = json.loads(args.out.read_text())
        if report["settings"] != settings:
            raise cli.UserError(f"--out {str(args.out)!r} has results of {report['settings']}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    train_data = load(args.data / "train", args.images)
    test_data = load(args.data / "test", 10000)
    for seed in args.seeds:
        for name in args.filters:
            runs = report["results"].setdefault(name, {})
            if str(seed) in runs:
                continue
            result = train(name, seed, args, train_data, test_data)
            runs[str(seed)] = {key: round(value, 3) for key, value in result.items()}
            print(name, seed, runs[str(seed)], flush=True)
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    table = tabulate(report["results"], args.width)
    args.out.with_suffix(".md").write_text(table)
    print(table)


if __name__ == "__main__":
    cli.run(main, "compare_filters_cifar.py")
