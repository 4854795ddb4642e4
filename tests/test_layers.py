"""Imports only point down, and `import jgd` loads neither JAX nor an optional package."""

import ast
import subprocess
import sys
from pathlib import Path

import jgd
import jgd.optimizers
import jgd.schedules
import jgd.transforms

PACKAGE = Path(jgd.__file__).parent
PAGE = PACKAGE.parent / "docs" / "contributing.md"

# From bottom to top: a module may import the modules before it in this list. One entry describes a
# group of modules. `python tests/test_layers.py` writes the picture in the docs.
LAYERS = [
    ("version", ""),
    ("nodes", "pytree nodes: structure without leaves, links by name"),
    ("checks", "checks of plain arguments"),
    ("arguments", "the kinds of a factory's parameters"),
    ("calls", "calls of a factory: from arguments to its body"),
    ("sharding", "parameters on a mesh: gathered arrays, sharded states"),
    ("trees", "loops over leaves, and errors if trees do not match"),
    ("dtypes", "float32 at least inside, the dtypes of gradients or parameters outside"),
    ("exporting", "optimizers as arguments of `jax.export`"),
    ("door", "init and update as a user calls them: dtypes, schedules, errors"),
    ("pytree", "as_pytree: a call of a factory becomes a pytree of its numbers"),
    ("lanes", "batches of optimizers"),
    ("arithmetic", "quotients, roots and averages: finite at 0, exact for decimals"),
    ("combinators", "chain, divide, add, subtract, with_nesterov, named"),
    ("transforms", "the basic transformations: averages, bias correction, roots, decay"),
    ("rules", "a formula on one array, lifted over the tree"),
    ("norms", "transformations that depend on a whole array"),
    ("clipping", "gradients with a bound on their norm"),
    ("linear_algebra", "functions of a matrix with finite derivatives"),
    ("ramps", ""),
    ("schedules", "step -> value; every argument may be traced"),
    ("wrappers", "wrappers of whole optimizers"),
    ("precision", "wrappers for 16-bit parameters"),
    ("inspection", "schedules evaluated at the current step"),
    ("groups", "optimizers by path, rates by width"),
    ("stopping", "early stopping and plateaus: pairs over a metric"),
    ("regularization", "penalties, dropout, batch norm"),
    ("optimizers.classic", ""),
    ("optimizers.moments", ""),
    ("optimizers.adaptive", ""),
    ("optimizers.normalized", ""),
    ("optimizers.signs", ""),
    ("optimizers.layerwise", ""),
    ("optimizers.factored", ""),
    ("optimizers.orthogonal", ""),
    ("optimizers.kronecker", ""),
    ("optimizers.dual", ""),
    ("optimizers.free", ""),
    ("optimizers.lifted", ""),
    ("optimizers", "one file for each family: `scale_by_x` directly above `x`"),
    ("compat.shared", ""),
    ("compat.state_matching", ""),
    ("compat.keras.options", ""),
    ("compat.keras.optimizers", ""),
    ("compat.keras.lookup", ""),
    ("compat.keras.schedules", ""),
    ("compat.keras.callbacks", ""),
    ("compat.keras.state", ""),
    ("compat.keras", ""),
    ("compat.torch.optimizers", ""),
    ("compat.torch.schedules", ""),
    ("compat.torch.callbacks", ""),
    ("compat.torch.state", ""),
    ("compat.torch", ""),
    ("compat.textbook", ""),
    ("compat.optax", ""),
    ("compat", "keras, torch, textbook, optax: other conventions, conversion of states"),
    ("catalog", "the optimizers by name, and their table"),
    ("diagnosis", "verdicts from the loss"),
    ("training", "Task, Run, train"),
    ("tuning.distributions", ""),
    ("tuning.space", ""),
    ("tuning.options", ""),
    ("tuning.prune", ""),
    ("tuning.plan", ""),
    ("tuning.events", ""),
    ("tuning.ledger", ""),
    ("tuning.devices", ""),
    ("tuning.pool", ""),
    ("tuning.pack", ""),
    ("tuning.compiling", ""),
    ("tuning.batches", ""),
    ("tuning.streams", ""),
    ("tuning.lanes", ""),
    ("tuning.engine", ""),
    ("tuning.widths", ""),
    ("tuning.inputs", ""),
    ("tuning.result", ""),
    ("tuning.loop", ""),
    ("tuning.join", ""),
    ("tuning.lock", ""),
    ("tuning.segment", ""),
    ("tuning.folder", ""),
    ("tuning.load", ""),
    ("tuning.poll", ""),
    ("tuning.sweep", ""),
    ("tuning.propose", ""),
    ("tuning.console", ""),
    ("tuning.plots", ""),
    ("tuning.tasks", ""),
    ("tuning.parsing", ""),
    ("tuning.commands", ""),
    ("tuning", "the host side of a sweep: plan, events, ledger, pool, engine, turns, folder"),
    ("nnx", "flax's nnx.Optimizer, with the numbers as Variables"),
    ("cli", "the command line"),
]
ORDER = [name for name, _ in LAYERS]
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

# modules that only a command, or a user with the extra, loads
TERMINAL = ("nnx", "tuning.plots", "tuning.console", "tuning.tasks", "tuning.commands")


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


def _picture():
    rows = []
    for name, purpose in LAYERS:
        package = (PACKAGE / name.replace(".", "/")).is_dir()
        if purpose and (package or (PACKAGE / (name.replace(".", "/") + ".py")).exists()):
            file = f"jgd/{name.replace('.', '/')}{'/' if package else '.py'}"
            rows.append(f"{file:24}{purpose}")
    return "\n".join(rows)


def test_imports_point_down():
    modules = dict(_modules())
    assert set(modules) <= set(ORDER)
    for name, tree in modules.items():
        for imported, node in _imports(tree):
            if imported.startswith("jgd."):
                below = imported.removeprefix("jgd.")
                if below == name:  # a package imports its own modules
                    continue
                assert ORDER.index(below) < ORDER.index(name), f"{name}:{node.lineno} {imported}"


def test_extras_are_imported_only_where_they_are_used():
    """No module that `import jgd` or `jgd --help` loads imports an extra at its top."""
    for name, tree in _modules():
        for node in tree.body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for imported, _ in _imports(ast.Module([node], [])):
                if imported.split(".")[0] in EXTRAS:
                    assert name in TERMINAL, f"{name} imports {imported}"


def _loaded_by(program):
    source = "import sys; " + program + "; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


def test_import_jgd_loads_nothing_and_no_extra():
    assert not _loaded_by("import jgd") & {"jax", "optax", *EXTRAS}
    everything = "import jgd; [getattr(jgd, name) for name in jgd.__all__]"
    assert not (_loaded_by(everything) - _loaded_by("import optax")) & EXTRAS


def test_the_picture_in_the_docs_shows_the_layers():
    assert f"```\n{_picture()}\n```" in PAGE.read_text()


def test_public_names_belong_to_their_modules():
    for name in jgd.__all__:
        assert getattr(jgd, name) is not None
        assert name in dir(jgd)
    for module in (jgd.transforms, jgd.optimizers, jgd.schedules):
        assert set(module.__all__) <= set(jgd.__all__)


if __name__ == "__main__":
    text = PAGE.read_text()
    before, mark, rest = text.partition("```\n")
    PAGE.write_text(f"{before}{mark}{_picture()}\n{rest[rest.index('```') :]}")
