"""Helpers that prepare a sweep without starting it, and that yield its events."""

from jgd.tuning.sweep import TrainingArguments, prepare


def prepare_sweep(task, settings, steps, **options):
    """Return a sweep that has not started."""
    return prepare(TrainingArguments(task, settings, steps, **options))


def events(prepared):
    """Run a prepared sweep, and yield its events as `iter_sweep` does."""
    sweep = prepared.sweep
    while sweep.start():
        yield from sweep.take()
        sweep.finish()
    yield from sweep.take()
