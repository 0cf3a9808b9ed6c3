"""The ImageNet recipes equal the official training: ddfnet's train.py with timm 0.4.5."""

from __future__ import annotations

import copy
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner
from PIL import Image
from torchvision import transforms as tv_transforms
from torchvision.transforms import InterpolationMode

from ddf_mm.engine.launch import adapt_to_device
from ddf_mm.layers import DDFPack, FilterNorm

pytest.importorskip("mmpretrain")

from mmpretrain.registry import MODELS, TRANSFORMS

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = {
    f"ddf-{combine}-resnet{depth}_8xb128_in1k.py": (combine, depth)
    for combine, depth in itertools.product(("mul", "add"), (50, 101, 152))
}
REFERENCE = "ddf-mul-resnet50_8xb128_in1k.py"
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
PARAMETERS = {50: 16_843_748, 101: 28_146_912, 152: 37_462_900}

RGB_MEAN = (123.675, 116.28, 103.53)
RGB_STD = (58.395, 57.12, 57.375)


def load(recipe: str) -> Config:
    return Config.fromfile(CONFIGS / "classification" / recipe)


@pytest.fixture(scope="module")
def cfg() -> Config:
    return load(REFERENCE)


@pytest.fixture(scope="module")
def model(cfg: Config) -> torch.nn.Module:
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


@pytest.fixture(autouse=True)
def _mmpretrain_scope():
    init_default_scope("mmpretrain")
    np.random.seed(0)


# --------------------------------------------------------------------------------------- models


def test_every_recipe_is_listed():
    assert {path.name for path in (CONFIGS / "classification").glob("*_in1k.py")} == set(RECIPES)


def official_parameters(blocks: tuple[int, ...], se_ratio: float = 0.2, taps: int = 9) -> int:
    """Number of parameters of the official network, from its layers."""
    total = 3 * 64 * 7 * 7 + 2 * 64  # stem
    in_channels = 64
    for stage, number in enumerate(blocks):
        mid = 64 * 2**stage
        out = 4 * mid
        squeezed = int(mid * se_ratio)
        spatial = mid * taps + taps
        channel = mid * squeezed + squeezed + squeezed * mid * taps + mid * taps
        std = mid * taps
        for block in range(number):
            total += in_channels * mid + mid * out + 2 * (mid + mid + out)
            total += spatial + channel + std
            if block == 0:
                total += in_channels * out + 2 * out
            in_channels = out
    return total + in_channels * 1000 + 1000


@pytest.mark.parametrize("recipe", RECIPES)
def test_architecture(recipe: str):
    combine, depth = RECIPES[recipe]
    assert official_parameters(BLOCKS[depth]) == PARAMETERS[depth]

    model = MODELS.build(load(recipe).model)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[depth]
    packs = [m for m in model.modules() if isinstance(m, DDFPack)]
    assert len(packs) == sum(BLOCKS[depth])
    assert {pack.kernel_combine for pack in packs} == {combine}
    assert model.head.fc.out_features == 1000


def test_initialization_is_the_official_one(model: torch.nn.Module):
    bound = 1 / math.sqrt(2048)  # torch.nn.Linear's own
    for parameter in (model.head.fc.weight, model.head.fc.bias):
        assert parameter.abs().max() <= bound
        assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    for name, parameter in model.backbone.named_parameters():
        if name.endswith("bn3.weight"):
            assert not parameter.any()
        elif name.endswith(("bn1.weight", "bn2.weight", "downsample.1.weight")):
            assert (parameter == 1).all()


def test_loss_is_timms_label_smoothing(model: torch.nn.Module):
    logits, target = torch.randn(8, 1000), torch.randint(1000, (8,))
    torch.testing.assert_close(
        model.head.loss_module(logits, target),
        F.cross_entropy(logits, target, label_smoothing=0.1),
    )


# ------------------------------------------------------------------------------------- schedule


def official_lr(epoch: int, lr: float = 0.4, warmup_lr: float = 1e-4, min_lr: float = 1e-5):
    if epoch < 5:
        return warmup_lr + epoch * (lr - warmup_lr) / 5
    if epoch < 120:
        return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * epoch / 120))
    return min_lr


class Schedule:
    """The recipe's schedulers on a dummy optimizer."""

    def __init__(self, cfg: Config, lr: float | None = None):
        options = {k: v for k, v in cfg.optim_wrapper.optimizer.items() if k != "type"}
        if lr is not None:
            options["lr"] = lr
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], **options)
        self.optimizer = OptimWrapper(optimizer)
        self.schedulers = [
            PARAM_SCHEDULERS.build(copy.deepcopy(c), default_args=dict(optimizer=self.optimizer))
            for c in cfg.param_scheduler
        ]

    def run(self, epochs: int) -> list[float]:
        values = []
        for _ in range(epochs):
            values += self.optimizer.get_lr()["lr"]
            self.optimizer.step()
            for scheduler in self.schedulers:
                assert scheduler.by_epoch
                scheduler.step()
        return values


def test_learning_rate_of_each_epoch(cfg: Config):
    assert cfg.train_cfg == dict(by_epoch=True, max_epochs=130, val_interval=1)
    expected = [official_lr(epoch) for epoch in range(130)]
    # Largest relative difference measured: 1.2e-15, rounding.
    assert Schedule(cfg).run(130) == pytest.approx(expected, rel=1e-13)


def test_learning_rate_after_resuming(cfg: Config):
    for epoch in (3, 5, 6, 60, 121):
        before = Schedule(cfg)
        before.run(epoch)
        after = Schedule(cfg)
        after.optimizer.load_state_dict(before.optimizer.state_dict())
        for new, old in zip(after.schedulers, before.schedulers, strict=True):
            new.load_state_dict(old.state_dict())
        expected = [official_lr(e) for e in range(epoch, 130)]
        assert after.run(130 - epoch) == pytest.approx(expected, rel=1e-13)


def test_learning_rate_scales_with_the_batch(cfg: Config):
    assert cfg.auto_scale_lr.base_batch_size == 8 * cfg.train_dataloader.batch_size == 1024
    # The minimum stays 1e-5, so the curve is scaled up to 1e-5 / 0.4 / 8.
    expected = [official_lr(epoch, lr=0.05, warmup_lr=1e-4 / 8) for epoch in range(130)]
    assert Schedule(cfg, lr=0.4 / 8).run(130) == pytest.approx(expected, rel=1e-6)


def test_optimizer(cfg: Config, model: torch.nn.Module):
    assert cfg.optim_wrapper.type == "AmpOptimWrapper"
    assert cfg.optim_wrapper.loss_scale == "dynamic"
    cfg = copy.deepcopy(cfg)
    adapt_to_device(cfg)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer

    assert type(optimizer) is torch.optim.SGD
    decay = {}
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"]) == (0.4, 0.9, True)
        assert group["dampening"] == 0
        decay.update(dict.fromkeys(group["params"], group["weight_decay"]))
    assert decay == {p: 0.0 if p.ndim <= 1 else 1e-4 for p in model.parameters()}

    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    stds = [
        m.std for m in model.modules() if isinstance(m, FilterNorm) and m.filter_type == "channel"
    ]
    assert len(stds) == sum(BLOCKS[50])
    assert {decay[p] for p in biases + stds} == {0.0}


def test_runtime(cfg: Config):
    assert [hook.type for hook in cfg.custom_hooks] == ["SyncBuffersHook"]  # --dist-bn reduce
    assert cfg.randomness.seed == 42
    assert cfg.randomness.diff_rank_seed  # train.py seeds with 42 + rank
    assert cfg.env_cfg.cudnn_benchmark
    assert cfg.default_hooks.checkpoint.save_best == "accuracy/top1"
    assert "_scope_" not in cfg.visualizer  # some tools pass it as keyword arguments


# ----------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def train_transforms(cfg: Config) -> dict:
    """The built transforms of the training pipeline by the first class name in each."""
    init_default_scope("mmpretrain")
    built = [TRANSFORMS.build(t) for t in cfg.train_dataloader.dataset.pipeline]
    names = [type(transform).__name__ for transform in built]
    assert names == [
        "LoadImageFromFile",
        "RandomChoice",
        "RandomFlip",
        "RandomChoice",
        "RandomApply",
        "PackInputs",
    ]
    return dict(zip(("load", "crop", "flip", "randaug", "erase", "pack"), built, strict=True))


def alternatives(choice) -> list[list]:
    assert choice.prob is None  # equal chances
    return [list(branch) for branch in choice.transforms]


def test_random_resized_crop(train_transforms: dict):
    crops = [crop for (crop,) in alternatives(train_transforms["crop"])]
    assert [type(crop).__name__ for crop in crops] == ["RandomResizedCrop"] * 2
    assert [crop.interpolation for crop in crops] == ["bilinear", "bicubic"]
    for crop in crops:
        assert crop.scale == (224, 224)
        assert crop.crop_ratio_range == (0.08, 1.0)
        assert crop.aspect_ratio_range == (3 / 4, 4 / 3)
        assert crop.backend == "pillow"


def test_flip(train_transforms: dict):
    flip = train_transforms["flip"]
    assert (flip.prob, flip.direction) == (0.5, "horizontal")


def test_rand_augment(train_transforms: dict):
    augments = [augment for (augment,) in alternatives(train_transforms["randaug"])]
    assert [type(augment).__name__ for augment in augments] == ["RandAugment"] * 2
    # `_RAND_INCREASING_TRANSFORMS` of timm: name, value at level 0, value at level 10.
    expected = [
        ("AutoContrast", None),
        ("Equalize", None),
        ("Invert", None),
        ("Rotate", (0, 30)),
        ("Posterize", (4, 0)),
        ("Solarize", (256, 0)),
        ("SolarizeAdd", (0, 110)),
        ("ColorTransform", (0, 0.9)),
        ("Contrast", (0, 0.9)),
        ("Brightness", (0, 0.9)),
        ("Sharpness", (0, 0.9)),
        ("Shear", (0, 0.3)),
        ("Shear", (0, 0.3)),
        ("Translate", (0, 0.45)),
        ("Translate", (0, 0.45)),
    ]
    for augment, interpolation in zip(augments, ("bilinear", "bicubic"), strict=True):
        assert augment.num_policies == 2
        operations = list(augment)
        assert [(type(op).__name__, op.magnitude_range) for op in operations] == expected
        for operation in operations:
            assert operation.prob == 0.5
            if operation.magnitude_range is not None:
                assert operation.magnitude_level == 7
                assert operation.magnitude_std == 0.5
                assert operation.total_level == 10
        geometric = [op for op in operations if hasattr(op, "pad_val")]
        assert len(geometric) == 5
        for operation in geometric:
            assert operation.interpolation == interpolation
            assert operation.pad_val == tuple(round(value) for value in reversed(RGB_MEAN))


def test_random_erasing(train_transforms: dict):
    erase = train_transforms["erase"]
    assert erase.prob == 0.4
    (choice,) = erase.transforms.transforms
    branches = alternatives(choice)
    assert [len(branch) for branch in branches] == [1, 2, 3]
    for branch in branches:
        for box in branch:
            assert type(box).__name__ == "RandomErasing"
            assert box.erase_prob == 1
            assert box.min_area_ratio * len(branch) == pytest.approx(0.02)
            assert box.max_area_ratio * len(branch) == pytest.approx(1 / 3)
            assert box.aspect_range == pytest.approx((0.3, 1 / 0.3))
            assert box.mode == "rand"
            assert tuple(box.fill_color) == tuple(reversed(RGB_MEAN))
            assert tuple(box.fill_std) == tuple(reversed(RGB_STD))


def test_random_erasing_fills_with_noise_per_pixel(train_transforms: dict):
    untouched = np.zeros((64, 64, 3), dtype=np.uint8)
    erased = []
    areas = []
    for _ in range(1000):
        image = train_transforms["erase"](dict(img=untouched.copy()))["img"]
        mask = (image != untouched).any(axis=2)
        areas.append(mask.mean())
        erased.append(image[mask])
    areas = np.array(areas)
    # 1000 draws: the standard deviation of this share is 0.0155.
    assert (areas > 0).mean() == pytest.approx(0.4, abs=0.05)
    assert areas.max() < 0.36
    noise = np.concatenate(erased).astype(float)
    # Clipping to 0..255 moves the mean of the noise by less than one grey level.
    assert noise.mean(axis=0) == pytest.approx(list(reversed(RGB_MEAN)), abs=1.5)
    assert noise.std(axis=0) == pytest.approx(list(reversed(RGB_STD)), rel=0.05)
    correlation = np.corrcoef(noise.T)
    assert np.abs(correlation - np.eye(3)).max() < 0.05


def test_evaluation_pipeline_equals_torchvision(cfg: Config, tmp_path: Path):
    image = np.random.randint(0, 256, (300, 500, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(image).save(path)
    expected = tv_transforms.Compose(
        [
            tv_transforms.Resize(256, InterpolationMode.BICUBIC),
            tv_transforms.CenterCrop(224),
            tv_transforms.ToTensor(),
            tv_transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )(Image.open(path))

    preprocessor = MODELS.build(dict(type="ClsDataPreprocessor", **cfg.data_preprocessor))
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        results = dict(img_path=str(path), gt_label=3)
        for transform in loader.dataset.pipeline:
            results = TRANSFORMS.build(transform)(results)
        batch = dict(inputs=[results["inputs"]], data_samples=[results["data_samples"]])
        torch.testing.assert_close(preprocessor(batch)["inputs"][0], expected, rtol=0, atol=1e-5)


def test_data_loaders(cfg: Config):
    for loader, split in (
        (cfg.train_dataloader, "train"),
        (cfg.val_dataloader, "val"),
        (cfg.test_dataloader, "val"),
    ):
        assert loader.batch_size == 128
        assert (loader.dataset.type, loader.dataset.split) == ("ImageNet", split)
    assert cfg.train_dataloader.sampler.shuffle
    assert cfg.train_dataloader.drop_last
    assert not cfg.val_dataloader.get("drop_last", False)
    assert not cfg.val_dataloader.sampler.shuffle


# ---------------------------------------------------------------------------------- inheritance


def without_scopes(value):
    """A config without the ``_scope_`` that mmengine adds to configs of packages."""
    if isinstance(value, dict):
        return {k: without_scopes(v) for k, v in value.items() if k != "_scope_"}
    if isinstance(value, (list, tuple)):
        return [without_scopes(v) for v in value]
    return value


@pytest.mark.parametrize("recipe", RECIPES)
def test_inherited_through_the_package(recipe: str, tmp_path: Path):
    path = tmp_path / "inherited.py"
    path.write_text(f'_base_ = "ddf_mm::classification/{recipe}"\n')
    inherited = Config.fromfile(path)
    assert without_scopes(inherited.to_dict()) == without_scopes(load(recipe).to_dict())


def test_inherited_recipe_builds(tiny_imagenet: Path, tmp_path: Path, recwarn):
    path = tmp_path / "inherited.py"
    path.write_text(f'_base_ = "ddf_mm::classification/{REFERENCE}"\n')
    cfg = shrink(Config.fromfile(path), tiny_imagenet, tmp_path, crop=32)
    cfg.log_level = "WARNING"
    runner = Runner.from_cfg(cfg)
    assert type(runner.visualizer).__name__ == "UniversalVisualizer"
    assert "SyncBuffersHook" in {type(hook).__name__ for hook in runner.hooks}
    batch = next(iter(runner.build_dataloader(cfg.train_dataloader)))
    assert [tuple(image.shape) for image in batch["inputs"]] == [(3, 32, 32)] * 2
    # Dicts that other configs reuse by name can be built as well.
    for transform in cfg.train_pipeline + cfg.test_pipeline:
        TRANSFORMS.build(transform)
    runner.optim_wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    assert len(runner.build_param_scheduler(cfg.param_scheduler)) == 3
    assert not [w for w in recwarn if "Failed to search registry" in str(w.message)]


# ------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def tiny_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in ImageNet's format: four images of four classes in each split."""
    root = tmp_path_factory.mktemp("imagenet")
    (root / "meta").mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        lines = []
        for label in range(4):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            height, width = generator.integers(240, 400, 2)
            pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{split}_{label}.JPEG")
            lines.append(f"{folder.name}/{split}_{label}.JPEG {label}\n")
        # Without these lists mmpretrain needs a folder for each of the 1000 classes.
        (root / "meta" / f"{split}.txt").write_text("".join(lines))
    return root


def shrink(cfg: Config, data_root: Path, work_dir: Path, crop: int) -> Config:
    """Two iterations of training and two of evaluation, at a crop of ``crop`` pixels."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(work_dir)
    cfg.train_cfg.max_epochs = 1
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.batch_size = 2
        loader.num_workers = 0
        loader.dataset.data_root = str(data_root)
        for transform in loader.dataset.pipeline:
            if transform.type == "CenterCrop":
                transform.crop_size = crop
            for branch in transform.get("transforms", ()):
                for nested in branch if isinstance(branch, list) else ():
                    if nested.type == "RandomResizedCrop":
                        nested.scale = crop
    adapt_to_device(cfg)
    return cfg


@pytest.fixture
def work_dir(tmp_path: Path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # checkpoints of 135 MB


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recipe", RECIPES)
def test_trains_and_tests(recipe: str, tiny_imagenet: Path, work_dir: Path):
    crop = 224 if recipe == REFERENCE else 32
    cfg = shrink(load(recipe), tiny_imagenet, work_dir, crop)
    cfg.log_level = "WARNING"
    if recipe != REFERENCE:  # one recipe is enough for a whole network and for checkpoints
        cfg.model.backbone.update(depth=26, base_channels=16)
        cfg.model.head.in_channels = 16 * 8 * 4
        cfg.default_hooks.checkpoint.update(interval=-1, save_best=None)
    runner = Runner.from_cfg(cfg)

    inputs, finite, conv_dtypes = [], [], set()

    def record_backbone(module, args, output):
        inputs.append((module.training, tuple(args[0].shape)))
        finite.append(bool(output[-1].isfinite().all()))

    def record_conv(module, args, output):
        conv_dtypes.add((module.training, output.dtype))

    runner.model.backbone.register_forward_hook(record_backbone)
    runner.model.backbone.layer1[0].conv1.register_forward_hook(record_conv)
    runner.train()
    metrics = runner.test()

    assert runner.iter == 2
    size = (2, 3, crop, crop)
    # Two iterations each of training, validation and test.
    assert inputs == [(True, size)] * 2 + [(False, size)] * 4
    assert all(finite)
    half = torch.float16 if get_device() == "cuda" else torch.bfloat16
    assert (True, half) in conv_dtypes  # automatic mixed precision was on

    losses, _ = runner.message_hub.get_scalar("train/loss").data
    assert len(losses) == 2
    # An untrained classifier of 1000 classes has chance accuracy.
    assert losses[0] == pytest.approx(math.log(1000), abs=1.0)
    assert runner.optim_wrapper.get_lr()["lr"][0] == pytest.approx(official_lr(1))
    # The last norm of each block is initialized with zero; the optimizer has changed it.
    assert all(block.bn3.weight.any() for block in runner.model.backbone.layer4)
    assert all(p.isfinite().all() for p in runner.model.parameters())
    assert set(metrics) == {"accuracy/top1", "accuracy/top5"}
    if recipe == REFERENCE:
        names = {path.name for path in work_dir.glob("*.pth")}
        assert names == {"epoch_1.pth", "best_accuracy_top1_epoch_1.pth"}
