"""Lanes sharded over eight simulated CPU devices, in a separate process."""

import os
import subprocess
import sys

import pytest
from conftest import cached_environment

PROGRAM = """
import os, sys
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
sys.path.insert(0, {tests!r})
import jax, numpy as np, jgd
from sweeps import events, prepare_sweep
from test_training import line_task
assert jax.device_count() == 8
settings = {{"adam": jgd.grid(jgd.adam, learning_rate=np.geomspace(1e-4, 1, 21))}}
options = dict(seeds=2, width=16, report_every=8)
halving = jgd.successive_halving(2, 16)
prepared = prepare_sweep(line_task(), settings, 64, halving=halving, **options)
list(events(prepared))
(program,) = prepared.sweep.engine.programs
assert set(program.chunks) <= {{16, 8}}, program.chunks
for width, chunk in program.chunks.items():  # one program for each width
    text = chunk.program.as_text()
    assert "num_partitions=8" in text
    for operation in ("all-reduce", "all-gather", "all-to-all", "collective-permute"):
        assert operation not in text, (width, operation)
spread = jgd.sweep(line_task(), settings, 64, **options)
alone = jgd.sweep(line_task(), settings, 64, devices=1, **options)
loss = lambda result: {{row["learning_rate"]: row["loss"] for row in result.rows}}
for rate, value in loss(alone).items():
    np.testing.assert_allclose(loss(spread)[rate], value, rtol=1e-4)
for wrong in (0, 9):
    try:
        jgd.sweep(line_task(), settings, 64, devices=wrong)
    except ValueError as error:
        assert f"devices must be in 1 to 8, got {{wrong}}" in str(error)
folder = {folder!r}
def crash(plan, report):
    if report.step == 40:
        raise RuntimeError
try:
    jgd.sweep(line_task(), settings, 64, halving=halving, folder=folder, checkpoint_every=0.0,
              on_report=crash, **options)
except RuntimeError:
    pass
resumed = jgd.sweep(line_task(), settings, 64, halving=halving, folder=folder, resume=True,
                    **options)
reference = jgd.sweep(line_task(), settings, 64, halving=halving, **options)
assert resumed.rows == reference.rows
for before, after in ((3, 2), (2, 8), (1, 3)):
    where = dict(halving=halving, folder=folder + str(before))
    try:
        jgd.sweep(line_task(), settings, 64, checkpoint_every=0.0, on_report=crash, devices=before,
                  **where, **options)
    except RuntimeError:
        pass
    moved = jgd.sweep(line_task(), settings, 64, resume=True, devices=after, **where, **options)
    for rate, value in loss(reference).items():
        np.testing.assert_allclose(loss(moved)[rate], value, rtol=1e-3)
print("done")
"""


@pytest.mark.slow
def test_lanes_on_eight_devices(tmp_path):
    program = PROGRAM.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "run"))
    environment = {**cached_environment(), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "done", done.stderr[-3000:]
