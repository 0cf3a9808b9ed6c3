"""The Python of README and docs is run as written; their links and commands lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import ddf_mm  # noqa: F401  (resolves `mmseg::` and `ddf_mm::` bases)

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Needs images and checkpoints: tests/test_inference.py runs its code.
PREPARED = ROOT / "docs" / "inference.md"
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    if page != PREPARED
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
]
CONFIGS = [block for block in BLOCKS if "_base_" in block.values[0]]
SNIPPETS = [block for block in BLOCKS if "_base_" not in block.values[0]]


def test_there_are_snippets_and_configs():
    assert len(SNIPPETS) >= 8 and len(CONFIGS) >= 2


@pytest.mark.parametrize("code", SNIPPETS)
def test_snippets_run_and_print_the_shapes_they_claim(code):
    scope: dict = {}
    exec(code, scope)
    claims = re.findall(r"^(.*\.shape) +# (\[[\d, ]+\])", code, re.MULTILINE)
    for expression, shape in claims:
        assert str(list(eval(expression, scope))) == shape


@pytest.mark.parametrize("text", CONFIGS)
def test_configs_build(text, tmp_path):
    toolbox = re.search(r'_base_ = (?:\[\s*)?"(\w+)::', text).group(1)
    pytest.importorskip(f"{toolbox}.registry")
    path = tmp_path / "config.py"
    path.write_text(text)
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    assert any(type(module).__module__.startswith("ddf_mm.") for module in model.modules())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_tools_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)\)", text)
    tools = re.findall(r"(?<![\w/])((?:tools|configs)/[\w./-]+\.(?:py|sh))", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [tool for tool in tools if not (ROOT / tool).exists()]
    assert not missing
