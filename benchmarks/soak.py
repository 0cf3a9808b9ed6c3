#!/usr/bin/env python3
"""Soak test of the layers on a CPU: results must stay bit for bit the same, and memory constant.

It runs forward and backward passes with many image sizes and changing numbers of threads, filters
in forked workers of data loaders, and inference in several threads at once. Every result is
compared with the first one for the same arguments. The exit status is 1 if one differs, or if the
memory grew."""

import argparse
import json
import os
import random
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ddf_mm.engine import cli
from ddf_mm.engine.cli import UserError
from ddf_mm.layers import DDFPack, DDFUpPack
from ddf_mm.ops import backend_info, ddf

SIZES = [(2, 7, 9), (1, 16, 16), (3, 12, 5), (1, 33, 20), (2, 24, 31), (4, 8, 8)]
STRIDES = (1, 2)
# Steps between readings of memory: each size with each stride once.
ROUND = len(SIZES) * len(STRIDES)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="soak.py", description=__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="default: 2000")
    parser.add_argument(
        "--growth", type=float, default=1.0, help="allowed growth in percent; default: 1"
    )
    parser.add_argument("--threads", type=int, default=8, help="for inference; default: 8")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    if args.steps < 8 * ROUND:
        parser.error(f"--steps must be at least {8 * ROUND}, got {args.steps}")
    return args


def same(what: str, got: Sequence[Tensor], first: Sequence[Tensor]) -> None:
    """Raise :class:`UserError` if results differ from the first ones."""
    if not all(map(torch.equal, got, first)):
        raise UserError(f"{what}: the result differs from the first one")


def inputs_of(size: tuple[int, int, int], stride: int) -> list[Tensor]:
    """Reproducible random arguments of the op."""
    generator = torch.Generator().manual_seed(stride)
    batch, height, width = size
    out_size = [(n - 1) // stride + 1 for n in (height, width)]
    shapes = [(batch, 16, height, width), (batch, 16, 3, 3), (batch, 9, *out_size)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def op_and_gradients(size: tuple[int, int, int], stride: int) -> list[Tensor]:
    """The op's result and gradients."""
    tensors = [t.requires_grad_() for t in inputs_of(size, stride)]
    out = ddf(*tensors, 3, 1, stride)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), tensors)]


def grown(memory: list[int]) -> float:
    """Growth of memory in percent, from the median of the second quarter of the readings to that of
    the last. In the first quarter caches are filled."""
    quarter = len(memory) // 4
    early = statistics.median(memory[quarter : 2 * quarter])
    return 100 * (statistics.median(memory[-quarter:]) / early - 1)


def train(steps: int) -> list[int]:
    """Mixed sizes, strides and thread counts; the bytes of memory after each round."""
    layers = nn.ModuleList([DDFPack(16), DDFPack(16, stride=2), DDFUpPack(16)])
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-4)
    kinds = [(size, stride) for size in SIZES for stride in STRIDES]
    first = {kind: op_and_gradients(*kind) for kind in kinds}
    most = max(2, os.cpu_count() or 1)
    order = random.Random(0)
    process = psutil.Process()
    memory = []
    before = torch.get_num_threads()
    for step in range(steps):
        if step % ROUND == 0:
            order.shuffle(kinds)
        kind = kinds[step % ROUND]
        # Shifted in each round, so that each size is run with each number of threads.
        torch.set_num_threads(1 + (step + step // ROUND) % most)
        same(f"step {step}, {kind}", op_and_gradients(*kind), first[kind])
        images = inputs_of(*kind)[0]
        loss = sum(layer(images).square().mean() for layer in layers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % ROUND == ROUND - 1:
            memory.append(process.memory_info().rss)
    torch.set_num_threads(before)
    return memory


class Filtered(Dataset):
    """What a worker process computes with the op."""

    def __len__(self) -> int:
        return ROUND

    def __getitem__(self, index: int) -> list[Tensor]:
        return op_and_gradients(SIZES[index // len(STRIDES)], STRIDES[index % len(STRIDES)])


def load(rounds: int) -> None:
    """Data loaders with forked workers, after this process has used its own threads."""
    first = [Filtered()[i] for i in range(ROUND)]
    for _ in range(rounds):
        loader = DataLoader(
            Filtered(),
            batch_size=None,
            num_workers=2,
            multiprocessing_context="fork",
            timeout=60,
        )
        for index, item in enumerate(loader):
            same(f"worker, item {index}", item, first[index])


def infer(threads: int, rounds: int) -> None:
    """Inference of one network in several threads at once."""
    network = nn.Sequential(DDFPack(16), nn.ReLU(), DDFPack(16, stride=2), DDFUpPack(16)).eval()

    def run(size: tuple[int, int, int]) -> list[Tensor]:
        # Grad mode is local to a thread.
        with torch.no_grad():
            return [network(inputs_of(size, 1)[0])]

    first = {size: run(size) for size in SIZES}
    with ThreadPoolExecutor(threads) as pool:
        for size, got in zip(
            SIZES * rounds * threads, pool.map(run, SIZES * rounds * threads), strict=True
        ):
            same(f"one of {threads} threads, {size}", got, first[size])


def main() -> None:
    """Run all parts and report the memory."""
    args = parse_args()
    torch.manual_seed(0)
    infer(args.threads, max(1, args.steps // 200))
    load(max(1, args.steps // 1000))
    memory = train(args.steps)
    result = dict(
        steps=args.steps,
        backend=backend_info()["cpu"],
        megabytes=round(memory[-1] / 2**20, 1),
        growth_percent=round(grown(memory), 2),
    )
    print(", ".join(f"{name} {value}" for name, value in result.items()))
    if args.json is not None:
        args.json.write_text(json.dumps(result) + "\n")
    if result["growth_percent"] > args.growth:
        print(f"soak.py: memory grew by more than {args.growth} %", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main, "soak.py")
