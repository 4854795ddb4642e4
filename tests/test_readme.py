"""The examples of the README run, in their order, in one session."""

import re
from pathlib import Path

import numpy as np

import jgd

README = Path(jgd.__file__).parent.parent / "README.md"


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["train"]._cache_size() == 1  # for both rates
    assert names["result"].rows[0]["loss"] < 0.1
    assert names["result"].best.params["w"].shape == (2,)
    assert names["tx"] == jgd.adam(1e-3)
    assert [row["ended"] for row in names["halved"].rows].count("finished") == 8
    assert names["again"].rows == names["halved"].rows
    assert names["fast"].rows[0]["ended"] == "reached target"
    assert len(names["kept"].kept) == 5
    assert names["loaded"].rows == names["extended"].rows
    assert len(names["merged"].rows) == 33
    assert names["pulled"].rows[0]["value"] > 0.7
    assert names["streamed"].rows[0]["loss"] < 0.1
    assert len(names["swept"].rows) == 6


def test_the_worked_example_is_its_oracle():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {"jgd": jgd}
    exec(next(b for b in blocks if "def qhm" in b).split("qhm(0.1)")[0], names)
    exec(next(b for b in blocks if "def oracle" in b), names)
    tx, step = names["qhm"](0.1, nu=0.6), names["oracle"](0.1, nu=0.6)
    state = tx.init(np.zeros(5, np.float32))
    for g in np.random.default_rng(0).normal(size=(50, 5)):
        updates, state = tx.update(g.astype(np.float32), state)
        np.testing.assert_allclose(updates, step(g, None), rtol=1e-4, atol=1e-7)


def test_links_lead_somewhere():
    for page in (README, README.parent / "benchmarks" / "README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
        for path in re.findall(r"`((?:tests|benchmarks|jgd)/[\w/.]+)`", page.read_text()):
            assert (README.parent / path).exists(), f"{page.name}: {path}"


def test_the_version_is_said_alike():
    for name, form in (("CITATION.cff", "version: {}\n"), ("CHANGELOG.md", "\n## {} ")):
        assert form.format(jgd.__version__) in (README.parent / name).read_text()
