"""The examples of the README run, in their order, in one session."""

import re
from pathlib import Path

import jgd

README = Path(jgd.__file__).parent.parent / "README.md"


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    assert names["step"]._cache_size() <= 2  # one trace for both rates, one for the lanes
    assert names["result"].rows[0]["loss"] < 0.1
    assert names["result"].best.params["w"].shape == (2,)
    assert names["tx"] == jgd.adam(1e-3)
    assert [row["ended"] for row in names["halved"].rows].count("finished") == 8
    assert names["again"].rows == names["halved"].rows
