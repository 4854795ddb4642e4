"""The command line: `jgd sweep`, `jgd report`, `jgd optimizers`. `jgd --help` needs no jax."""

import importlib.util
import sys

EXTRAS = ("tyro", "rich", "matplotlib", "sklearn", "orbax")


def main() -> None:
    """Run the command `jgd`."""
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        print(
            f'jgd: missing packages: {names}. Run python -m pip install "jgd[sweep]"',
            file=sys.stderr,
        )
        raise SystemExit(2)
    from jgd.tuning import commands

    commands.main()


if __name__ == "__main__":
    main()
