"""optax's own tests, from its wheel, pass with jgd's functions in the place of optax's.

The plugin `in_optax_place` replaces the functions. `DIFFERENCES` lists the tests that fail for this
reason, and why. Some tests of optax run each optimizer with each dtype and problem. Of these a
sample runs, in which every optimizer occurs. `TESTS=all` runs all tests, as the weekly workflow
does, in three times the time.
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

# Files in which no test reaches a function of jgd. All other files run.
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

_16_BIT = "for 16-bit parameters jgd's accumulators are float32, and optax's have 16 bits"
_TRACED = "`chain` refuses a transformation of optax that holds traced numbers: they would leak"
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
        "an unknown mode raises ValueError in the call, not in `update`"
    ),
    "contrib/_galore_test.py::GaLoreTest::test_mu_dtype_controls_moment_dtype": _16_BIT,
    "contrib/_schedule_free_test.py::ScheduleFreeTest::test_explicit_dtype3": _16_BIT,
    "tree_utils/_state_utils_test.py::StateUtilsTest::test_map_non_params_to_none": (
        "jgd counts the steps of a scheduled number outside of the optimizer's state"
    ),
}


def _files():
    """Return the test files of optax that run."""
    files = sorted(path.relative_to(OPTAX).as_posix() for path in OPTAX.rglob("*_test.py"))
    return [f for f in files if not any(fnmatch.fnmatch(f, pattern) for pattern in UNREACHED)]


def _run(tests, report, *options):
    """Run tests in a process of their own; return the plugin's report and pytest's output."""
    workers = ["-n2", "--dist=worksteal"] if importlib.util.find_spec("xdist") else []
    no_config = [f"--rootdir={OPTAX}", f"-c{os.devnull}", "-pno:cacheprovider"]
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = dict(PYTHONPATH=os.pathsep.join(paths), IN_OPTAX_PLACE=str(report))
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-pin_optax_place", "-q", "--tb=short"),
            *(*no_config, *workers, *options),
            *(f"{OPTAX}/{test}" for test in tests),
        ],
        cwd=report.parent,
        env=cached_environment() | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode in (0, 1), result.stdout + result.stderr
    return json.loads(report.read_text()), result.stdout


def _failed(report):
    return {test for test, result in report["tests"].items() if result["outcome"] == "failed"}


@pytest.mark.slow
def test_optax_passes_its_tests_with_jgd_in_its_place(tmp_path):
    sample = [] if os.environ.get("TESTS") == "all" else ["--sample"]
    report, printed = _run(_files(), tmp_path / "jgd.json", *sample)
    failed = _failed(report)
    if failed:  # some tests may fail with optax's own functions too
        without_jgd, _ = _run(sorted(failed), tmp_path / "optax.json", "--optax-itself")
        failed -= _failed(without_jgd)

    matches = fnmatch.fnmatchcase
    unlisted = [t for t in sorted(failed) if not any(matches(t, listed) for listed in DIFFERENCES)]
    assert not unlisted, "\n".join([printed, "tests that fail but are not listed:", *unlisted])
    stale = [listed for listed in DIFFERENCES if not any(matches(t, listed) for t in failed)]
    assert not stale, f"listed tests that do not fail: {stale}"
    assert len(report["reached"]) >= 70, report["reached"]
