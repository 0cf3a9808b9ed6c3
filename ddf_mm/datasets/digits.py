"""Handwritten digits that come with scikit-learn."""

from __future__ import annotations

from math import ceil

import numpy as np
from mmengine.registry import DATASETS

try:
    from mmpretrain.datasets import BaseDataset
except ImportError as error:
    raise ImportError(
        "ddf_mm.datasets needs mmpretrain (its datasets subclass mmpretrain's BaseDataset): "
        "install onedl-mmpretrain, or mmpretrain with the official mmcv and mmengine"
    ) from error

_SPLITS = ("train", "test")


@DATASETS.register_module()
class DigitsDataset(BaseDataset):
    """The 1,797 scanned digits of 8 x 8 pixels that come with scikit-learn.

    Real images without a download: the test part of `Optical Recognition of Handwritten Digits
    <https://archive.ics.uci.edu/dataset/80>`_, read by ``sklearn.datasets.load_digits``. It has
    no official split; the held-out part is random, stratified by class, and depends only on
    ``test_size`` and ``seed``.

    A pipeline starts without ``LoadImageFromFile``: each data info holds ``img`` (``uint8[8, 8,
    3]``, 0 is paper and 255 ink, three equal channels), ``img_shape`` and ``ori_shape`` (height,
    width), ``gt_label``, and ``img_id``, the image's place in scikit-learn's order.

    Args:
        split: ``'train'`` or ``'test'``, the held-out part.
        test_size: fraction of the images that is held out; both parts must keep at least one
            image of each class.
        seed: seed of the split, below 2**32.
        test_mode: raise if the pipeline returns ``None``, instead of trying another image. ``None``
            means only for ``split='test'``.
        **kwargs: other arguments of mmpretrain's ``BaseDataset`` (``pipeline``, ``indices``,
            ``metainfo``, ``lazy_init``, …).

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
        ImportError: scikit-learn is not installed.

    Example:
        >>> DigitsDataset(split="test", pipeline=[dict(type="PackInputs")])[0]["inputs"].shape
        torch.Size([3, 8, 8])
    """

    METAINFO = {"classes": tuple("0123456789")}

    def __init__(
        self,
        split: str = "train",
        test_size: float = 0.2,
        seed: int = 0,
        test_mode: bool | None = None,
        **kwargs,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split must be 'train' or 'test', got {split!r}")
        if not isinstance(test_size, float):
            raise TypeError(f"test_size must be a float, a fraction, got {test_size!r}")
        if not 0 < test_size < 1:
            raise ValueError(f"test_size must be between 0 and 1, got {test_size}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {seed!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be at least 0 and below 2**32, got {seed}")
        self.split = split
        self.test_size = test_size
        self.seed = seed
        test_mode = split == "test" if test_mode is None else test_mode
        # BaseDataset requires an annotation file; mmpretrain's own datasets without one (CIFAR10,
        # …) also pass an empty name.
        super().__init__(ann_file="", test_mode=test_mode, **kwargs)

    def load_data_list(self) -> list[dict]:
        """The data infos of the split, in scikit-learn's order."""
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError(
                "DigitsDataset reads the images that come with scikit-learn, which cannot be "
                "imported: pip install scikit-learn"
            ) from error

        digits = load_digits()
        total, num_classes = len(digits.target), len(digits.target_names)
        held_out = ceil(total * self.test_size)
        if not num_classes <= held_out <= total - num_classes:
            raise ValueError(
                f"test_size must leave at least {num_classes} of the {total} images in each "
                f"split, one a class, got {self.test_size}: {total - held_out} for training, "
                f"{held_out} held out"
            )
        parts = train_test_split(
            np.arange(total),
            test_size=held_out,
            random_state=self.seed,
            stratify=digits.target,
        )
        chosen = np.sort(parts[_SPLITS.index(self.split)])
        # scikit-learn's values are 0 to 16.
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        return [
            dict(
                img=np.repeat(images[index, :, :, None], 3, axis=2),
                img_shape=images.shape[1:],
                ori_shape=images.shape[1:],
                gt_label=int(digits.target[index]),
                img_id=int(index),
            )
            for index in chosen
        ]

    def extra_repr(self) -> list[str]:
        """The lines of ``repr`` that describe the split."""
        return [
            f"Split: \t{self.split}",
            f"Held-out fraction: \t{self.test_size}",
            f"Seed: \t{self.seed}",
        ]
