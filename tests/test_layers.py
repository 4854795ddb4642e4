"""Arrows between modules only point down, and `import jgd` costs what optax costs."""

import ast
import subprocess
import sys
from pathlib import Path

import jgd
import jgd.optimizers
import jgd.schedules
import jgd.transforms

PACKAGE = Path(jgd.__file__).parent
ORDER = [  # a module may import those before it
    "arguments",
    "pytree",
    "combinators",
    "words",
    "transforms",
    "rules",
    "norms",
    "linear_algebra",
    "schedules",
    "wrappers",
    "inspection",
    "groups",
    "stopping",
    "regularization",
    "optimizers.classic",
    "optimizers.adaptive",
    "optimizers.normalized",
    "optimizers.signs",
    "optimizers.layerwise",
    "optimizers.factored",
    "optimizers.orthogonal",
    "optimizers.kronecker",
    "optimizers.dual",
    "optimizers.free",
    "optimizers.lifted",
    "optimizers",
    "compat.words",
    "compat.moving",
    "compat.keras.options",
    "compat.keras.optimizers",
    "compat.keras.schedules",
    "compat.keras.callbacks",
    "compat.keras.state",
    "compat.keras",
    "compat.torch.optimizers",
    "compat.torch.schedules",
    "compat.torch.callbacks",
    "compat.torch.state",
    "compat.torch",
    "compat.textbook",
    "compat",
    "catalog",
    "diagnosis",
    "training",
    "tuning.space",
    "tuning.prune",
    "tuning.plan",
    "tuning.devices",
    "tuning.streams",
    "tuning.programs",
    "tuning.waiting",
    "tuning.widths",
    "tuning.checks",
    "tuning.driver",
    "tuning.results",
    "tuning.store",
    "tuning.screen",
    "tuning.sweep",
    "tuning.propose",
    "tuning.plots",
    "tuning.tasks",
    "tuning",
    "nnx",
    "cli",
]
EXTRAS = {
    "keras",
    "torch",
    "sklearn",
    "rich",
    "tyro",
    "matplotlib",
    "orbax",
    "optuna",
    "flax",
    "equinox",
}


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if name not in ("__init__", "__main__"):
            yield name.removesuffix(".__init__"), ast.parse(path.read_text())


def _imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                yield (module if module.removeprefix("jgd.") in ORDER else node.module), node


def test_arrows_point_down():
    found = dict(_modules())
    assert set(found) <= set(ORDER)
    for name, tree in found.items():
        for imported, node in _imports(tree):
            if imported.startswith("jgd."):
                below = imported.removeprefix("jgd.")
                if below == name:  # a package gathers its modules
                    continue
                assert ORDER.index(below) < ORDER.index(name), f"{name}:{node.lineno} {imported}"


def test_extras_are_imported_where_they_are_used():
    """Never at the top of a module that `import jgd` or `jgd --help` loads."""
    for name, tree in _modules():
        for node in tree.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for imported, _ in _imports(ast.Module([node], [])):
                if imported.split(".")[0] in EXTRAS:
                    assert name in ("nnx", "tuning.plots", "tuning.screen", "tuning.tasks"), (
                        f"{name} imports {imported}"
                    )


def _loaded_by(program):
    shown = "import sys; " + program + "; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", shown], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_jgd_loads_nothing_and_no_extra():
    assert not _loaded_by("import jgd") & {"jax", "optax", *EXTRAS}
    everything = "import jgd; [getattr(jgd, name) for name in jgd.__all__]"
    assert not (_loaded_by(everything) - _loaded_by("import optax")) & EXTRAS


def test_public_names_are_those_of_their_modules():
    for name in jgd.__all__:
        assert getattr(jgd, name) is not None
        assert name in dir(jgd)
    for module in (jgd.transforms, jgd.optimizers, jgd.schedules):
        assert set(module.__all__) <= set(jgd.__all__)
