"""The examples of the README and of `docs/` run: those of a page in order, with shared names."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import release

import jgd

ROOT = Path(jgd.__file__).parent.parent
# the other folders of docs/ are written by a build of the site
FOLDERS = [ROOT / "docs", ROOT / "docs" / "concepts", ROOT / "docs" / "howto"]
DOCUMENTS = [
    ROOT / "README.md",
    *sorted(page for folder in FOLDERS for page in folder.glob("*.md")),
]
PAGES = [page for page in DOCUMENTS if "```python" in page.read_text()]

# what is true of the names of a page after its examples
CHECKS = {
    "README": lambda n: n["train"]._cache_size() == 1,  # one program for both learning rates
    "start": lambda n: (
        n["step"]._cache_size() == 1  # one program for both learning rates
        and jnp.allclose(n["w"], jnp.array([1, -2, 3]), atol=0.1)
    ),
    "pytree": lambda n: n["tx"] == jgd.adam(1e-3) and n["update"]._cache_size() == 1,
    "lanes": lambda n: n["ends"].shape == (64, 3),
    "sweep": lambda n: (
        n["result"].rows[0]["loss"] < 0.1
        and n["result"].best.params["w"].shape == (2,)
        and [row["ended"] for row in n["halved"].rows].count("finished") == 8
        and n["again"].rows == n["halved"].rows
        and n["fast"].rows[0]["ended"] == "reached target"
        and len(n["top"].kept) == 5
    ),
    "own-task": lambda n: (
        n["streamed"].rows[0]["loss"] < 0.1 and n["result"].rows[0]["value"] > 0.7
    ),
    "resume": lambda n: (
        n["resumed"].rows == n["alone"].rows
        and n["loaded"].rows == n["extended"].rows
        and len(n["extended"].rows) == 7
        and len(n["merged"].rows) == 5
    ),
    "own-optimizer": lambda n: n["lanes"].learning_rate.shape == (3,),
    "sixteen-bit": lambda n: (
        n["ends"].pop("plain")[0] == 1 and all(abs(end).max() < 0.1 for end in n["ends"].values())
    ),
    "stopping": lambda n: n["epoch"] == 3 and n["best"][0] == 0.5,
}


def _blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not hasattr(jax, "set_mesh"):  # jax 0.7.0
        monkeypatch.setattr(jax, "set_mesh", jax.sharding.use_mesh, raising=False)
    if page.stem == "flax" and release("flax") < (0, 12):
        pytest.skip("the sweep of a flax model needs flax 0.12")
    names: dict = {}
    for block in _blocks(page):
        exec(compile(block, str(page), "exec"), names)
    assert CHECKS.get(page.stem, lambda n: True)(names)


def test_pages_with_examples_are_found():
    assert len(PAGES) >= 15
    assert {*CHECKS} <= {page.stem for page in PAGES}


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text) <= 8000
    assert text.count("```") <= 2 * 4


def test_the_worked_example_equals_its_oracle():
    blocks = _blocks(ROOT / "docs" / "howto" / "own-optimizer.md")
    names: dict = {"jgd": jgd}
    exec(next(b for b in blocks if "def qhm" in b), names)
    exec(next(b for b in blocks if "def oracle" in b), names)
    tx, step = names["qhm"](0.1, nu=0.6), names["oracle"](0.1, nu=0.6)
    state = tx.init(np.zeros(5, np.float32))
    for g in np.random.default_rng(0).normal(size=(50, 5)):
        updates, state = tx.update(g.astype(np.float32), state)
        np.testing.assert_allclose(updates, step(g, None), rtol=1e-4, atol=1e-7)


def test_links_lead_to_files():
    for page in [ROOT / "benchmarks" / "README.md", *DOCUMENTS]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
        for path in re.findall(r"`((?:tests|benchmarks|jgd)/[\w/.]+)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_documents_have_the_version_of_the_package():
    for name, form in (("CITATION.cff", "version: {}\n"), ("CHANGELOG.md", "\n## {} ")):
        assert form.format(jgd.__version__) in (ROOT / name).read_text()
