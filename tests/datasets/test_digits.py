"""DigitsDataset: split, data infos, errors and import."""

import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

pytest.importorskip("mmpretrain")

from ddf_mm.datasets import DigitsDataset

TOTAL = 1797


def ids(dataset: DigitsDataset) -> list[int]:
    return [dataset.get_data_info(i)["img_id"] for i in range(len(dataset))]


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.mark.parametrize("test_size", [0.2, 0.5, 0.0101])
def test_split_is_disjoint_complete_and_stratified(digits, test_size):
    train = DigitsDataset("train", test_size=test_size)
    test = DigitsDataset("test", test_size=test_size)
    assert len(test) == int(np.ceil(TOTAL * test_size))
    assert sorted(ids(train) + ids(test)) == list(range(TOTAL))
    in_all = np.bincount(digits.target)
    in_test = np.bincount(test.get_gt_labels(), minlength=10)
    assert in_test.min() > 0
    assert np.abs(in_test - in_all * len(test) / TOTAL).max() < 1


def test_default_sizes():
    assert len(DigitsDataset("train")) == 1437
    assert len(DigitsDataset("test")) == 360


def test_split_depends_on_the_seed_only():
    first, again = DigitsDataset("test", seed=3), DigitsDataset("test", seed=3)
    np.random.seed(123)
    after_other_draws = DigitsDataset("test", seed=3)
    assert ids(first) == ids(again) == ids(after_other_draws)
    assert ids(first) != ids(DigitsDataset("test", seed=4))


def test_data_infos_hold_scikit_learns_images(digits):
    dataset = DigitsDataset("test")
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        scan = digits.images[info["img_id"]]
        assert info["img"].dtype == np.uint8
        assert info["img"].shape == (8, 8, 3)
        assert info["img_shape"] == info["ori_shape"] == (8, 8)
        np.testing.assert_array_equal(info["img"], np.stack([np.round(scan * 255 / 16)] * 3, -1))
        assert info["gt_label"] == digits.target[info["img_id"]]
    assert max(dataset.get_data_info(i)["img"].max() for i in range(20)) == 255


@pytest.mark.parametrize("serialize_data", [True, False])
def test_a_pipeline_cannot_change_the_stored_images(serialize_data):
    def erase(results):
        results["img"][:] = 0
        return results

    dataset = DigitsDataset("train", pipeline=[erase], serialize_data=serialize_data)
    before = dataset.get_data_info(0)["img"].copy()
    assert dataset[0]["img"].max() == 0
    np.testing.assert_array_equal(dataset.get_data_info(0)["img"], before)


def test_works_as_a_dataset_of_mmpretrain():
    from mmengine.registry import init_default_scope
    from mmpretrain.datasets import BaseDataset
    from mmpretrain.registry import DATASETS

    init_default_scope("mmpretrain")
    pipeline = [dict(type="Resize", scale=32), dict(type="PackInputs")]
    dataset = DATASETS.build(dict(type="DigitsDataset", split="test", pipeline=pipeline))
    assert isinstance(dataset, BaseDataset)
    assert list(dataset.CLASSES) == list("0123456789")
    assert dataset.get_cat_ids(5) == [dataset.get_data_info(5)["gt_label"]]
    item = dataset[5]
    assert item["inputs"].shape == (3, 32, 32)
    assert item["data_samples"].sample_idx == 5
    assert item["data_samples"].ori_shape == (8, 8)
    assert item["data_samples"].gt_label.item() == dataset.get_data_info(5)["gt_label"]
    assert "Split: \ttest" in repr(dataset)

    first = dataset.get_data_info(7)["img_id"]
    dataset.get_subset_([7, 8])
    assert len(dataset) == 2
    assert dataset.get_data_info(0)["img_id"] == first
    assert len(DigitsDataset("train", indices=100)) == 100
    assert list(DigitsDataset(classes=[*"abcdefghij"]).CLASSES) == list("abcdefghij")


def test_test_mode_follows_the_split_unless_given():
    assert DigitsDataset("test").test_mode
    assert not DigitsDataset("train").test_mode
    assert DigitsDataset("train", test_mode=True).test_mode


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(split="val"), ValueError, "split must be 'train' or 'test', got 'val'"),
        (dict(test_size=0.0), ValueError, "test_size must be between 0 and 1, got 0.0"),
        (dict(test_size=1.0), ValueError, "test_size must be between 0 and 1, got 1.0"),
        (dict(test_size=float("nan")), ValueError, "test_size must be between 0 and 1, got nan"),
        (dict(test_size=360), TypeError, "test_size must be a float, a fraction, got 360"),
        (dict(test_size=0.001), ValueError, "test_size .* got 0.001: 1795 for training, 2 held"),
        (dict(test_size=0.999), ValueError, "test_size .* got 0.999: 1 for training, 1796 held"),
        (dict(seed=1.5), TypeError, "seed must be an int, got 1.5"),
        (dict(seed=True), TypeError, "seed must be an int, got True"),
        (dict(seed=-1), ValueError, "seed must be at least 0 and below .* got -1"),
        (dict(seed=2**32), ValueError, "seed must be at least 0 and below .* got 4294967296"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DigitsDataset(**arguments)


def test_says_that_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        DigitsDataset()


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_only_this_dataset_needs_mmpretrain():
    result = run_python(
        "import sys\n"
        "sys.modules['mmpretrain'] = None\n"
        "import ddf_mm, ddf_mm.ops, ddf_mm.layers, ddf_mm.models, ddf_mm.datasets\n"
        "print('others imported')\n"
        "from ddf_mm.datasets import DigitsDataset\n"
    )
    assert result.stdout.strip().endswith("others imported")
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith("ImportError: ddf_mm.datasets needs mmpretrain")
    )


def test_scoped_name_needs_no_custom_imports():
    result = run_python(
        "from mmengine.registry import init_default_scope\n"
        "from mmpretrain.registry import DATASETS\n"
        "init_default_scope('mmpretrain')\n"
        "print(len(DATASETS.build(dict(type='ddf_mm.DigitsDataset', split='test'))))\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("360")
