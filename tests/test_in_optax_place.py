"""optax's own tests, from its wheel, pass with jgd's functions in the place of optax's.

`in_optax_place` puts them there. `DIFFERENCES` has every test that fails for it, and why.

optax runs some tests for each optimizer with each dtype and problem: a sample of them has every
optimizer in some. `TESTS=all` runs all, in three times the time, as the workflow does weekly.
"""

import fnmatch
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import optax
import pytest
from conftest import cached_environment

OPTAX = Path(optax.__file__).parent
HERE = Path(__file__).parent

# Files in which no test reaches a function of jgd; all others are run, in whole.
UNREACHED = [
    "_src/linear_algebra_test.py",
    "_src/numerics_test.py",
    "_src/update_test.py",
    "_src/utils_test.py",
    "assignment/*",
    "contrib/_mechanic_test.py",
    "contrib/_privacy_test.py",
    "contrib/_reduce_on_plateau_test.py",
    "losses/*",
    "microbatching/*",
    "optax_test.py",
    "perturbations/*",
    "projections/*",
    "tree_utils/_casting_test.py",
    "tree_utils/_random_test.py",
    "tree_utils/_tree_math_test.py",
]

_16_BIT = "16-bit parameters have float32 memories, whose dtype optax takes from the parameters"
_TRACED = "a link of optax that holds traced numbers is refused by `chain`, since it would leak"
DIFFERENCES = {
    "_src/alias_test.py::AliasTest::test_optimizers_can_be_wrapped_in_inject_hyperparams2[012]": (
        _TRACED
    ),
    "contrib/_common_test.py::ContribTest::test_optimizers_can_be_wrapped_in_inject_hyperparams"
    "[0245]": _TRACED,
    "contrib/_common_test.py::ContribTest::test_optimizers_can_be_wrapped_in_inject_hyperparams"
    "1[67]": _TRACED,
    "_src/alias_test.py::AliasTest::test_explicit_dtype9": _16_BIT,
    "_src/alias_test.py::AliasTest::test_explicit_dtype1[01]": _16_BIT,
    "_src/transform_test.py::TransformTest::test_lion_invalid_mode_raises": (
        "an unknown mode raises its ValueError in the call, not in `update`"
    ),
    "contrib/_galore_test.py::GaLoreTest::test_mu_dtype_controls_moment_dtype": _16_BIT,
    "contrib/_schedule_free_test.py::ScheduleFreeTest::test_explicit_dtype3": _16_BIT,
    "tree_utils/_state_utils_test.py::StateUtilsTest::test_map_non_params_to_none": (
        "a scheduled number keeps its step around the state of the whole optimizer"
    ),
}


def _files():
    files = sorted(path.relative_to(OPTAX).as_posix() for path in OPTAX.rglob("*_test.py"))
    return [f for f in files if not any(fnmatch.fnmatch(f, pattern) for pattern in UNREACHED)]


def _run(tests, report, *options):
    """What the plugin reports of these tests, and what pytest printed."""
    workers = ["-n2", "--dist=worksteal"] if importlib.util.find_spec("xdist") else []
    apart = [f"--rootdir={OPTAX}", f"-c{os.devnull}", "-pno:cacheprovider"]
    ours = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    more = dict(PYTHONPATH=os.pathsep.join(ours), IN_OPTAX_PLACE=str(report))
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-pin_optax_place", "-q", "--tb=short"),
            *(*apart, *workers, *options),
            *(f"{OPTAX}/{test}" for test in tests),
        ],
        cwd=report.parent,
        env=cached_environment() | more,
        capture_output=True,
        text=True,
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return json.loads(report.read_text()), result.stdout


def _failed(report):
    return {test for test, seen in report["tests"].items() if seen["outcome"] == "failed"}


@pytest.mark.slow
def test_optax_passes_its_tests_with_jgd_in_its_place(tmp_path):
    sample = [] if os.environ.get("TESTS") == "all" else ["--sample"]
    report, printed = _run(_files(), tmp_path / "jgd.json", *sample)
    failed = _failed(report)
    if failed:
        itself, _ = _run(sorted(failed), tmp_path / "optax.json", "--optax-itself")
        failed -= _failed(itself)

    fits = fnmatch.fnmatchcase
    unlisted = [t for t in sorted(failed) if not any(fits(t, listed) for listed in DIFFERENCES)]
    assert not unlisted, "\n".join([printed, "fail, and are not listed:", *unlisted])
    stale = [listed for listed in DIFFERENCES if not any(fits(t, listed) for t in failed)]
    assert not stale, f"listed, but none of them fails: {stale}"
    assert len(report["reached"]) >= 70, report["reached"]
