"""Small scenes of handwritten digits on photographs, in the formats of COCO and ADE20K."""

from __future__ import annotations

import colorsys
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

SPLITS = ("train", "val")
CLASSES = tuple("0123456789")
BACKGROUND = "background"
# matplotlib's tab10; the background is black.
PALETTE = (
    (31, 119, 180),
    (255, 127, 14),
    (44, 160, 44),
    (214, 39, 40),
    (148, 103, 189),
    (140, 86, 75),
    (227, 119, 194),
    (127, 127, 127),
    (188, 189, 34),
    (23, 190, 207),
)

# Held out for `val`: this fraction of the digits of each class, and the columns of each photograph
# beyond this fraction of its width.
_VAL_DIGITS = 0.2
_VAL_COLUMNS = 0.7
_CROP_SIDES = (96, 192)  # pixels of a photograph
_BRIGHTNESS = 0.5  # of the photographs; the digits are light
_DIGITS_PER_SCENE = (1, 4)
_DIGIT_SIDES = (0.3, 0.5)  # of the scene's side
_MIN_VISIBLE = 0.95  # fraction of a digit that others must not cover
_MIN_CONTRAST = 120.0  # RGB distance between a digit and the mean of what it covers; at most 441
_PLACEMENTS = 20
# In millimetres, the unit of the depth maps.
_BACKGROUND_DEPTH = (3500, 5500)
_DIGIT_DEPTH = (800, 3000)
_SLOPE = 0.25  # largest change of depth over the scene, of a surface's mean depth

MIN_SIZE, MAX_SIZE = 32, 2048


@dataclass(frozen=True)
class Scene:
    """An S x S scene with N digits, from far to near, and its ground truth.

    Attributes:
        image: ``uint8[S, S, 3]``, RGB.
        masks: ``bool[N, S, S]``, the visible part of each digit, without overlap.
        labels: ``int[N]``, the classes 0 to 9.
        depth: ``uint16[S, S]``, the distance of each pixel in millimetres.
        digits: ``int[N]``, the index of each digit in scikit-learn's data set.
    """

    image: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    depth: np.ndarray
    digits: np.ndarray


class DigitScenes:
    """Scenes of one split: scikit-learn's digits, resized and tinted, on darkened crops of its
    photographs.

    Both come with scikit-learn (``load_digits``, ``load_sample_images``), so nothing is
    downloaded. The splits share neither digits nor pixels of photographs: a fifth of the digits of
    each class is held out for ``val``, and crops for ``train`` are taken from the left 70 % of the
    columns of each photograph, those for ``val`` from the others.

    Scene ``i`` depends only on ``split``, ``size``, ``seed`` and ``i``.

    Args:
        split: ``'train'`` or ``'val'``.
        size: side S of the square scenes in pixels, 32 to 2048.
        seed: seed of the random numbers, not negative. The splits do not depend on it.

    Raises:
        ValueError: an argument has an invalid value.
        ImportError: scikit-learn is not installed.
    """

    def __init__(self, split: str, size: int = 128, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        if not MIN_SIZE <= size <= MAX_SIZE:
            raise ValueError(f"size must be {MIN_SIZE} to {MAX_SIZE} pixels, got {size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        from sklearn.datasets import load_digits, load_sample_images
        from sklearn.model_selection import train_test_split

        self.split = split
        self.size = size
        self.seed = seed
        digits = load_digits()
        self._ink = digits.images / 16
        self._labels = digits.target
        self._digits = train_test_split(
            np.arange(len(digits.target)),
            test_size=_VAL_DIGITS,
            random_state=0,
            stratify=digits.target,
        )[SPLITS.index(split)]
        self._photographs = []
        for photograph in load_sample_images().images:
            border = round(_VAL_COLUMNS * photograph.shape[1])
            columns = slice(border) if split == "train" else slice(border, None)
            # Cropped before resizing, since interpolation reads beyond the edge of a box.
            self._photographs.append(Image.fromarray(photograph[:, columns]))

    def __getitem__(self, index: int) -> Scene:
        random = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        image = self._background(random)
        depth = self._surface(random, random.uniform(*_BACKGROUND_DEPTH))
        wanted = random.integers(*_DIGITS_PER_SCENE, endpoint=True)
        # Painted from far to near.
        distances = np.sort(random.uniform(*_DIGIT_DEPTH, size=wanted))[::-1]
        masks: list[np.ndarray] = []
        areas: list[int] = []
        digits: list[int] = []
        for distance in distances:
            digit = int(random.choice(self._digits))
            alpha = self._place(random, digit, masks, areas)
            if alpha is None:
                continue
            mask = alpha >= 0.5
            tint = self._tint(random, image[mask].mean(axis=0))
            image += alpha[:, :, None] * (tint - image)
            depth = np.where(mask, self._surface(random, distance), depth)
            masks = [*(other & ~mask for other in masks), mask]
            areas.append(int(mask.sum()))
            digits.append(digit)
        return Scene(
            image=np.round(image).astype(np.uint8),
            masks=np.array(masks),
            labels=self._labels[digits],
            depth=np.round(depth).astype(np.uint16),
            digits=np.array(digits),
        )

    def _background(self, random: np.random.Generator) -> np.ndarray:
        """``float[S, S, 3]``: a darkened, resized and randomly mirrored crop of a photograph."""
        photograph = self._photographs[random.integers(len(self._photographs))]
        side = random.integers(*_CROP_SIDES, endpoint=True)
        left, top = (random.integers(length - side, endpoint=True) for length in photograph.size)
        crop = photograph.resize(
            (self.size, self.size),
            Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
        )
        image = _BRIGHTNESS * np.asarray(crop, dtype=np.float64)
        return image[:, ::-1].copy() if random.random() < 0.5 else image.copy()

    def _surface(self, random: np.random.Generator, distance: float) -> np.ndarray:
        """``float[S, S]``: the depth of a slanted plane at a mean distance."""
        across = np.linspace(-0.5, 0.5, self.size)
        down, right = random.uniform(-_SLOPE / 2, _SLOPE / 2, size=2)
        return distance * (1 + down * across[:, None] + right * across)

    def _place(
        self,
        random: np.random.Generator,
        digit: int,
        masks: list[np.ndarray],
        areas: list[int],
    ) -> np.ndarray | None:
        """``float[S, S]``: the opacity of a digit, placed so that enough of the previous ones stays
        visible; ``None`` if no such place was found."""
        side = round(self.size * random.uniform(*_DIGIT_SIDES))
        ink = Image.fromarray(self._ink[digit].astype(np.float32))
        ink = np.asarray(ink.resize((side, side), Image.Resampling.BICUBIC))
        # Makes edges about as sharp as those of the photographs.
        ink = np.clip((ink - 0.2) / 0.4, 0, 1)
        for _ in range(_PLACEMENTS):
            top, left = random.integers(self.size - side, size=2, endpoint=True)
            alpha = np.zeros((self.size, self.size))
            alpha[top : top + side, left : left + side] = ink
            free = alpha < 0.5
            if all(
                (mask & free).sum() >= _MIN_VISIBLE * area
                for mask, area in zip(masks, areas, strict=True)
            ):
                return alpha
        return None

    @staticmethod
    def _tint(random: np.random.Generator, covered: np.ndarray) -> np.ndarray:
        """``float[3]``: a light colour that stands out from the mean of what it covers."""
        while True:
            hue, saturation, value = random.uniform((0, 0.2, 0.75), (1, 0.7, 1))
            tint = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))
            if np.linalg.norm(tint - covered) >= _MIN_CONTRAST:
                return tint


def write_digit_scenes(
    out: str | os.PathLike, num_train: int, num_val: int, size: int = 128, seed: int = 0
) -> None:
    """Write a training and a validation split of :class:`DigitScenes`, with a progress bar.

    The folder holds, for each split:

    - ``images/<split>/*.jpg``;
    - ``annotations/instances_<split>.json``: COCO's boxes and run-length encoded masks;
    - ``annotations/panoptic_<split>.json`` and ``panoptic/<split>/*.png``: COCO's panoptic format;
    - ``semantic/<split>/*.png``: indexed PNGs, 0 background and 1 to 10 the digits 0 to 9;
    - ``depth/<split>/*.png``: 16 bit PNGs in millimetres.

    The same arguments write the same bytes (with the same versions of numpy, Pillow and
    scikit-learn). Everything is written into a temporary folder next to ``out``, which is renamed
    at the end, so that a data set is never incomplete.

    Args:
        out: folder to create; it must not exist, or be empty.
        num_train: scenes for training.
        num_val: scenes for validation.
        size: side of the square scenes in pixels, 32 to 2048.
        seed: seed of the random numbers, not negative.

    Raises:
        FileExistsError: ``out`` exists and is not an empty folder.
        ValueError: an argument has an invalid value.
        ImportError: scikit-learn or pycocotools is not installed.
    """
    counts = dict(zip(SPLITS, (num_train, num_val), strict=True))
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"num_{split} must be at least 1, got {count}")
    scenes = {split: DigitScenes(split, size, seed) for split in SPLITS}
    out = Path(os.path.abspath(out))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{str(out)!r} exists already: name another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f"{out.name}.unfinished-", dir=out.parent))
    try:
        jobs = [(split, i) for split, count in counts.items() for i in range(count)]
        writers = {split: _SplitWriter(unfinished, split) for split in SPLITS}
        for split, index in track(jobs, "Digit scenes", console=Console(stderr=True)):
            writers[split].add(scenes[split][index])
        for writer in writers.values():
            writer.finish(f"seed {seed}, {size} x {size} pixels")
        unfinished.chmod(0o777 & ~_umask())  # mkdtemp's folders are private to their owner
        os.replace(unfinished, out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


class _SplitWriter:
    """Writes scenes of one split and collects their annotations."""

    def __init__(self, root: Path, split: str) -> None:
        # Imported here, since only this needs it; it comes with mmdet.
        from pycocotools import mask

        self._encode = mask.encode
        self._root = root
        self._split = split
        for kind in ("images", "semantic", "panoptic", "depth"):
            (root / kind / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        self._images: list[dict] = []
        self._instances: list[dict] = []
        self._panoptic: list[dict] = []

    def add(self, scene: Scene) -> None:
        """Writes the images of a scene and collects its annotations."""
        index = len(self._images)
        name = f"{index:06d}"
        height, width = scene.depth.shape
        labels = scene.labels.tolist()

        semantic = np.zeros((height, width), dtype=np.uint8)
        segments = np.full((height, width), len(labels) + 1, dtype=np.uint8)
        records = []
        for number, (mask, label) in enumerate(zip(scene.masks, labels, strict=True), start=1):
            semantic[mask] = label + 1
            segments[mask] = number
            records.append(dict(id=number, category_id=label + 1, **self._extent(mask)))
        for record, mask in zip(records, scene.masks, strict=True):
            encoded = self._encode(np.asfortranarray(mask, dtype=np.uint8))
            segmentation = dict(size=encoded["size"], counts=encoded["counts"].decode("ascii"))
            annotation = dict(record, id=len(self._instances) + 1, image_id=index)
            self._instances.append(dict(annotation, segmentation=segmentation))
        background = self._extent(segments == len(labels) + 1)
        records.append(dict(id=len(labels) + 1, category_id=len(CLASSES) + 1, **background))

        self._images.append(dict(id=index, file_name=f"{name}.jpg", height=height, width=width))
        self._panoptic.append(dict(image_id=index, file_name=f"{name}.png", segments_info=records))
        indexed = Image.fromarray(semantic)
        indexed.putpalette([0, 0, 0, *(value for color in PALETTE for value in color)])
        # Identifiers are red + 256 green + 65536 blue; there are fewer than 256.
        identifiers = np.stack([segments, *[np.zeros_like(segments)] * 2], axis=2)
        self._save(Image.fromarray(scene.image), "images", f"{name}.jpg", quality=95, subsampling=0)
        self._save(indexed, "semantic", f"{name}.png")
        self._save(Image.fromarray(identifiers), "panoptic", f"{name}.png")
        self._save(Image.fromarray(scene.depth), "depth", f"{name}.png")

    def finish(self, description: str) -> None:
        """Writes the annotations."""
        info = dict(description=f"Digit scenes, {self._split}: {description}")
        categories = [
            dict(id=i, name=name, supercategory="digit") for i, name in enumerate(CLASSES, 1)
        ]
        self._dump(
            "instances",
            dict(
                info=info,
                images=self._images,
                annotations=self._instances,
                categories=categories,
            ),
        )
        colors = [*PALETTE, (0, 0, 0)]
        stuff = dict(id=len(CLASSES) + 1, name=BACKGROUND, supercategory=BACKGROUND)
        panoptic_categories = [
            dict(category, isthing=int(category is not stuff), color=color)
            for category, color in zip([*categories, stuff], colors, strict=True)
        ]
        self._dump(
            "panoptic",
            dict(
                info=info,
                images=self._images,
                annotations=self._panoptic,
                categories=panoptic_categories,
            ),
        )

    @staticmethod
    def _extent(mask: np.ndarray) -> dict:
        """The box (left, top, width, height), area and crowd flag of a mask."""
        rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]
        return dict(bbox=box, area=int(mask.sum()), iscrowd=0)

    def _save(self, picture: Image.Image, kind: str, name: str, **options) -> None:
        picture.save(self._root / kind / self._split / name, **options)

    def _dump(self, kind: str, content: dict) -> None:
        path = self._root / "annotations" / f"{kind}_{self._split}.json"
        path.write_text(json.dumps(content))
