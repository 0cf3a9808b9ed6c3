"""Pairs of an image and a map of the same size, for joint upsampling."""

from __future__ import annotations

import os
from collections.abc import Sequence

import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.fileio import get, list_dir_or_file
from mmengine.registry import DATASETS, TRANSFORMS
from mmengine.structures import BaseDataElement, PixelData

DOWNSAMPLING_MODES = ("area", "nearest-exact", "bilinear", "bicubic")


@DATASETS.register_module()
class GuidedUpsamplingDataset(BaseDataset):
    """Images in one folder and maps of the same names in another.

    Each data info holds ``img_path`` and ``map_path``.

    Args:
        data_prefix: the folders ``dict(img_path=…, map_path=…)`` below ``data_root``.
        img_suffix: suffix of the images' names.
        map_suffix: suffix of the maps' names.
        **kwargs: other arguments of mmengine's ``BaseDataset`` (``data_root``, ``pipeline``,
            ``indices``, …).

    Raises:
        FileNotFoundError: a folder is missing, there is no image, or an image has no map.
    """

    def __init__(
        self,
        data_prefix: dict,
        img_suffix: str = ".jpg",
        map_suffix: str = ".png",
        **kwargs,
    ) -> None:
        self.img_suffix = img_suffix
        self.map_suffix = map_suffix
        super().__init__(ann_file="", data_prefix=data_prefix, **kwargs)

    def load_data_list(self) -> list[dict]:
        """The pairs, in the order of their names."""
        images, maps = (self.data_prefix[name] for name in ("img_path", "map_path"))
        names = self._names(images, self.img_suffix)
        without_map = sorted(names - self._names(maps, self.map_suffix))
        if without_map:
            raise FileNotFoundError(
                f"{maps!r} lacks {without_map[0]}{self.map_suffix}, the map of "
                f"{without_map[0]}{self.img_suffix}"
            )
        return [
            dict(
                img_path=os.path.join(images, name + self.img_suffix),
                map_path=os.path.join(maps, name + self.map_suffix),
            )
            for name in sorted(names)
        ]

    @staticmethod
    def _names(folder: str, suffix: str) -> set[str]:
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder!r} is not a folder")
        files = list_dir_or_file(folder, list_dir=False, suffix=suffix, recursive=True)
        names = {file.removesuffix(suffix) for file in files}
        if not names:
            raise FileNotFoundError(f"{folder!r} holds no {suffix} files")
        return names


@TRANSFORMS.register_module()
class LoadMap(BaseTransform):
    """Loads a map of one channel, such as a depth PNG of 16 bits.

    Reads ``map_path``; adds ``gt_map``, ``float32[H, W]``.

    Args:
        unit: factor for the file's values.

    Raises:
        ValueError: the file is not an image of one channel.
    """

    def __init__(self, unit: float = 1.0) -> None:
        self.unit = unit

    def transform(self, results: dict) -> dict:
        path = results["map_path"]
        loaded = mmcv.imfrombytes(get(path), flag="unchanged", backend="cv2")
        if loaded is None or loaded.ndim != 2:
            shape = "no image" if loaded is None else f"shape {loaded.shape}"
            raise ValueError(f"{path!r} must be a map of one channel, got {shape}")
        results["gt_map"] = loaded.astype(np.float32) * np.float32(self.unit)
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(unit={self.unit})"


@TRANSFORMS.register_module()
class PackGuidedUpsampling(BaseTransform):
    """Downsamples the map and packs the inputs of :class:`~ddf_mm.models.DDFUpNet`.

    Reads ``img`` (BGR, as mmcv loads it) and ``gt_map``. Returns ``inputs``, the low resolution
    map, ``Tensor[1, H/s, W/s]``; ``guide``, the image in RGB, ``Tensor[3, H, W]``; and
    ``data_samples`` with ``gt_map.data``, ``Tensor[1, H, W]``.

    Args:
        scale_factor: s, a divisor of the image's size.
        mode: how to downsample the map, a mode of ``torch.nn.functional.interpolate``: ``'area'``
            averages, ``'nearest-exact'`` selects pixels, ``'bilinear'`` and ``'bicubic'`` are
            antialiased.
        meta_keys: keys of the sample's meta data.

    Raises:
        ValueError: an argument has an invalid value, or the sizes of image and map differ or are
            not multiples of s.
    """

    def __init__(
        self,
        scale_factor: int,
        mode: str = "area",
        meta_keys: Sequence[str] = ("img_path", "map_path"),
    ) -> None:
        if scale_factor < 1:
            raise ValueError(f"scale_factor must be at least 1, got {scale_factor}")
        if mode not in DOWNSAMPLING_MODES:
            raise ValueError(f"mode must be one of {', '.join(DOWNSAMPLING_MODES)}, got {mode!r}")
        self.scale_factor = scale_factor
        self.mode = mode
        self.meta_keys = meta_keys

    def transform(self, results: dict) -> dict:
        image, gt_map = results["img"], torch.from_numpy(results["gt_map"])[None]
        size = gt_map.shape[1:]
        if image.shape[:2] != size or any(length % self.scale_factor for length in size):
            raise ValueError(
                f"{results['img_path']}: image and map must have one size, a multiple "
                f"of scale_factor {self.scale_factor}, got {image.shape[:2]} and {tuple(size)}"
            )
        low = F.interpolate(
            gt_map[None],
            size=[length // self.scale_factor for length in size],
            mode=self.mode,
            antialias=self.mode in ("bilinear", "bicubic"),
        )[0]
        guide = torch.from_numpy(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)))
        sample = BaseDataElement(metainfo={key: results[key] for key in self.meta_keys})
        sample.gt_map = PixelData(data=gt_map)
        return dict(inputs=low, guide=guide.float(), data_samples=sample)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale_factor={self.scale_factor}, mode={self.mode!r})"
