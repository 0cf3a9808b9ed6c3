"""The Python code of README and docs runs; links, anchors, commands and options exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import ddf_mm  # noqa: F401  (resolves `mmseg::` and `ddf_mm::` bases)

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Its code needs images and checkpoints; tests/test_inference.py runs it.
PREPARED = ROOT / "docs" / "inference.md"
# Pages whose links are checked.
ALL_PAGES = [*sorted(ROOT.glob("*.md")), *PAGES[1:], *sorted((ROOT / "configs").glob("*/*.md"))]
CONFIG_FILES = [
    path for path in sorted((ROOT / "configs").glob("*/*.py")) if path.parent.name != "_base_"
]
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    if page != PREPARED
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
]
# By `_base_ = …` or, in pure Python, `with read_base()`.
CONFIGS = [block for block in BLOCKS if "_base" in block.values[0]]
SNIPPETS = [block for block in BLOCKS if "_base" not in block.values[0]]


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
    named = re.search(r'_base_ = (?:\[\s*)?"(\w+)::', text)
    toolbox = named.group(1) if named else "mmpretrain"
    pytest.importorskip(f"{toolbox}.registry")
    path = tmp_path / "config.py"
    path.write_text(text)
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    assert any(type(module).__module__.startswith("ddf_mm.") for module in model.modules())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site make of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.M):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        numbered = (f"{slug}-{n}" for n in range(1, 100))
        found.add(slug if slug not in found else next(n for n in numbered if n not in found))
    return found


def test_anchors_are_those_of_github(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` of c-d, [e](f.md)!\n```bash\n# no heading\n```\n## Twice\n## Twice\n")
    assert anchors(page) == {"a-b-of-c-d-e", "twice", "twice-1"}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_links_anchors_and_tools_exist(page):
    text = page.read_text(encoding="utf-8")
    missing = []
    links = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)
    links += re.findall(r"<(?:img|a) [^>]*(?:src|href)=\"(?!https?:)([^\"]+)\"", text)
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    tools = re.findall(r"(?<![\w/])((?:tools|configs)/[\w./-]+\.(?:py|sh))", text)
    missing += [tool for tool in tools if not (ROOT / tool).exists()]
    assert not missing


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")
def test_options_of_tools_exist(page):
    missing = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for command in block.replace("\\\n", " ").splitlines():
            command = command.partition(" #")[0]
            if not (tool := re.search(r"(?<![\w/])tools/[\w./-]+\.(?:py|sh)", command)):
                continue
            # Launchers pass options on; tools share those of cli.py.
            launched = re.search(r"(train|test)\.sh$", tool[0])
            sources = [ROOT / "ddf_mm" / "engine" / "cli.py", ROOT / tool[0]]
            sources += [ROOT / "tools" / f"{launched[1]}.py"] if launched else []
            known = "".join(source.read_text(encoding="utf-8") for source in sources)
            options = re.findall(r"(?<![\w-])--[a-z][\w-]*", command[tool.end() :])
            missing += [f"{tool[0]} {o}" for o in options if f'"{o}"' not in known]
    assert not missing


@pytest.mark.parametrize("config", CONFIG_FILES, ids=lambda path: path.stem)
def test_recipes_name_every_config(config):
    name = f"{config.parent.name}/{config.stem}"
    assert f"`{name}`" in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
