"""mmpretrain's reparameterize_model.py on a DDF-ResNet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mmpretrain
import pytest
import torch
from mmengine.config import Config
from mmpretrain.apis import init_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "classification" / "ddf-mul-resnet26_digits.py"
TOOL = Path(mmpretrain.__file__).parent / ".mim/tools/model_converters/reparameterize_model.py"


@pytest.mark.skipif(not TOOL.is_file(), reason="an mmpretrain without its tools")
def test_the_deployed_checkpoint_gives_the_same_scores(tmp_path):
    model = init_model(str(CONFIG), device="cpu")
    model.train()(torch.randn(8, 3, 32, 32))  # non-initial running statistics
    torch.save({"state_dict": model.state_dict(), "meta": {}}, tmp_path / "model.pth")
    arguments = [CONFIG, tmp_path / "model.pth", tmp_path / "deployed.pth"]
    subprocess.run([sys.executable, TOOL, *arguments], check=True, cwd=ROOT, capture_output=True)

    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.deploy = True
    deployed = init_model(cfg, str(tmp_path / "deployed.pth"), device="cpu")
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in deployed.backbone.modules())
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(deployed(x), model.eval()(x), rtol=1e-4, atol=1e-5)
