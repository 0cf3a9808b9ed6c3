"""Datasets; importing the package registers them and needs mmpretrain."""

from ddf_mm.datasets.digits import DigitsDataset

__all__ = ["DigitsDataset"]
