#!/usr/bin/env python3
"""Time networks in PyTorch, ONNX Runtime, OpenVINO, torch.export and AOTInductor on a CPU.

Batch norms are folded. Every file is compared with the network in PyTorch. Runs alternate, and
ratios are medians over pairs of runs, to the first network in the same runtime."""

import argparse
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.logging import MMLogger
from torch import Tensor, nn

from ddf_mm import about, analysis
from ddf_mm.engine import cli, export, launch
from ddf_mm.layers import switch_to_deploy
from ddf_mm.ops.export import decompositions
from ddf_mm.utils import toolbox

RUNTIMES = ("PyTorch", "ONNX Runtime", "OpenVINO", "torch.export", "AOTInductor")


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.ArgumentParser(prog="compare_runtimes.py", description=__doc__)
    parser.add_argument("configs", nargs="+", help="paths of configs, or toolbox::path")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES[:4])
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    return parser.parse_args()


def build(config: str) -> nn.Module:
    """The classifier, or the backbone and neck, of a config, folded, with random weights."""
    cfg = launch.load_config(config)
    model = analysis.build_model(cfg)
    part = export.ImageScores if toolbox(cfg) == "mmpretrain" else export.ImageFeatures
    return switch_to_deploy(part(model).eval())


def open_vino(path: Path, threads: int) -> Callable[[Tensor], list[Tensor]]:
    """A function that runs an ONNX file in OpenVINO, in float32."""
    import openvino

    settings = dict(
        INFERENCE_NUM_THREADS=threads, PERFORMANCE_HINT="LATENCY", INFERENCE_PRECISION_HINT="f32"
    )
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda images: [torch.from_numpy(out) for out in compiled([images.numpy()]).to_tuple()]


def runners(
    model: nn.Module, size: export.Size, runtimes: list[str], threads: int, folder: Path
) -> dict[str, Callable]:
    """The network in each runtime; files are for images of any size, except AOTInductor's."""
    run = dict[str, Callable]()
    if "PyTorch" in runtimes:
        run["PyTorch"] = torch.no_grad()(model.forward)
    loaders = {"ONNX Runtime": export.load_onnx, "OpenVINO": open_vino}
    if loaders.keys() & set(runtimes):
        program = export.export_program(model, size, guarded=True)
    for runtime, load in loaders.items():
        if runtime in runtimes:
            path = folder / f"{runtime}.onnx"
            export.save_onnx(program, path, elementwise=runtime == "OpenVINO")
            run[runtime] = load(path, threads)
    if "torch.export" in runtimes:
        path = folder / "model.pt2"
        export.save_program(export.export_program(model, size), path)
        run["torch.export"] = export.load_program(path)
    if "AOTInductor" in runtimes:
        program = export.export_program(model, size, dynamic=False)
        with torch.no_grad():
            path = torch._inductor.aoti_compile_and_package(
                program.run_decompositions(decompositions()),
                package_path=str(folder / "compiled.pt2"),
            )
        run["AOTInductor"] = torch.no_grad()(torch._inductor.aoti_load_package(path))
    return run


def main() -> None:
    """Export, check and time."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    MMLogger.get_instance("mmengine", log_level="ERROR")
    size = export.Size(args.batch, *args.size)
    images = size.images(3)
    runtimes = [r for r in args.runtimes if r != "OpenVINO" or importlib.util.find_spec("openvino")]
    functions, errors = {}, {}
    with tempfile.TemporaryDirectory() as temporary:
        for config in args.configs:
            name = Path(config).stem
            folder = Path(temporary, name)
            folder.mkdir()
            model = build(config)
            for runtime, run in runners(model, size, runtimes, args.threads, folder).items():
                functions[runtime, name] = run
                errors[runtime, name] = export.largest_error(run, model, images)
        wall = {key: [] for key in functions}
        cpu = {key: [] for key in functions}
        for turn in range(args.runs + 2):
            for key, run in functions.items():
                start = time.perf_counter(), time.process_time()
                run(images)
                if turn > 1:
                    wall[key].append(1e3 * (time.perf_counter() - start[0]))
                    cpu[key].append(1e3 * (time.process_time() - start[1]))
    rows = []
    for runtime, name in functions:
        key, first = (runtime, name), (runtime, Path(args.configs[0]).stem)
        row = dict(runtime=runtime, network=name, error=errors[key])
        for clock, times in (("wall", wall), ("cpu", cpu)):
            row[f"{clock}_ms"] = round(statistics.median(times[key]), 1)
            ratios = [a / b for a, b in zip(times[key], times[first], strict=True)]
            row[f"{clock}_ratio"] = round(statistics.median(ratios), 3)
        rows.append(row)
    columns = list(rows[0])
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        row["error"] = float(f"{row['error']:.1e}")
        print(f"| {' | '.join(map(str, row.values()))} |")
    if args.json is not None:
        result = dict(size=str(size), rows=rows, machine=about.machine(threads=args.threads))
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, "compare_runtimes.py")
