"""A sweep in parts: planned, and its events one by one."""

from jgd.tuning.sweep import TrainingArguments, prepare


def planned(task, settings, steps, **options):
    """A sweep that has not started."""
    return prepare(TrainingArguments(task, settings, steps, **options))


def events(prepared):
    """Run a sweep; yield its events as `iter_sweep` does."""
    sweep = prepared.sweep
    while sweep.start():
        yield from sweep.take()
        sweep.finish()
    yield from sweep.take()
