"""Streams: a sweep reads batches from an iterator on the host once and ahead, and resumes it."""

import grain
import jax
import numpy as np
import pytest
from sweeps import events, prepare_sweep
from test_training import X, Y, line_task

import jgd

RATES = np.geomspace(1e-3, 0.3, 10)


class _Loader:
    """The batches of a task as iterators; records the steps whose batches were read."""

    def __init__(self, task, last=None):
        self.task, self.last, self.read = task, last, []

    def __call__(self):
        step = 0
        while self.last is None or step < self.last:
            self.read.append(step)
            yield tuple(map(np.asarray, self.task.batch(step)))
            step += 1


def _streamed(loader):
    return loader.task._replace(batch=jgd.stream(loader))


def _lanes():
    return {
        "adam": jgd.grid(jgd.adam, learning_rate=RATES),
        "sgd": jgd.grid(jgd.sgd, learning_rate=RATES[:5]),
    }


@pytest.mark.parametrize(
    "options", [dict(), dict(halving=jgd.successive_halving(4, 6)), dict(stop=2)]
)
def test_a_stream_trains_like_a_function_of_the_step(options):
    loader = _Loader(line_task())
    options = dict(width=4, report_every=5, seeds=2) | options
    streamed = jgd.sweep(_streamed(loader), _lanes(), 24, **options)
    plain = jgd.sweep(line_task(), _lanes(), 24, **options)
    for group in plain.curves:
        np.testing.assert_allclose(
            streamed.curves[group].train_loss, plain.curves[group].train_loss, rtol=1e-5
        )
    assert [row["ended"] for row in streamed.rows] == [row["ended"] for row in plain.rows]


def test_a_stream_is_read_once_for_all_tiles_and_groups():
    loader = _Loader(line_task())
    prepared = prepare_sweep(_streamed(loader), _lanes(), 24, width=4, report_every=6)
    before = len(loader.read)
    for report in events(prepared):
        assert max(loader.read) < report.step + 6 + 6  # one chunk ahead
    assert loader.read[before:] == list(range(24))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["generator", "grain"])
def test_a_resumed_sweep_continues_the_stream(kind, tmp_path):
    source = grain.MapDataset.source(list(zip(X, Y, strict=True))).shuffle(seed=3).repeat()
    loaders = []

    def batches():
        if kind == "generator":
            loaders.append(iter(_Loader(line_task())()))
        else:
            ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
            loaders.append(iter(source.batch(4).to_iter_dataset(ahead)))
        return loaders[-1]

    task = line_task()._replace(batch=jgd.stream(batches))
    options = dict(width=4, report_every=5, halving=jgd.successive_halving(4, 6))
    lanes = {"adam": jgd.grid(jgd.adam, learning_rate=RATES)}
    reference = jgd.sweep(task, lanes, 24, **options)
    for crash_at in (2, 7):
        reports, folder = [], tmp_path / str(crash_at)

        def crash(plan, report, reports=reports, crash_at=crash_at):
            reports.append(report)
            if len(reports) == crash_at:
                raise RuntimeError

        with pytest.raises(RuntimeError):
            jgd.sweep(
                task, lanes, 24, folder=folder, checkpoint_every=0.0, on_report=crash, **options
            )
        resumed = jgd.sweep(task, lanes, 24, folder=folder, resume=True, **options)
        assert repr(resumed.rows) == repr(reference.rows)


def test_streams_that_a_sweep_cannot_use_are_errors():
    lanes, smaller = _lanes(), line_task(batch_size=3)
    short = _streamed(_Loader(line_task(), last=10))
    with pytest.raises(
        ValueError, match="stream: the iterator ended after 10 batches; it must yield one"
    ):
        jgd.sweep(short, lanes, 24)
    with pytest.raises(TypeError, match="make must be a function that returns an iterator"):
        jgd.stream(iter([1]))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Train with jgd\.sweep"):
        jgd.train(_streamed(_Loader(line_task())), jgd.sgd(0.1), 4, jax.random.key(0))
    with pytest.raises(ValueError, match="order must be 'shared' for a stream"):
        jgd.sweep(_streamed(_Loader(line_task())), lanes, 24, order="own", seeds=2)

    def two_shapes():
        yield from (tuple(map(np.asarray, task.batch(0))) for task in (line_task(), smaller))

    with pytest.raises(ValueError, match="stream: all batches must have the shapes of the first"):
        jgd.sweep(line_task()._replace(batch=jgd.stream(two_shapes)), lanes, 24)


def test_reports_are_as_frequent_as_the_memory_for_batches_requires(monkeypatch):

    from jgd.tuning import streams

    size = sum(x.nbytes for x in line_task().batch(0))
    monkeypatch.setattr(streams, "BYTES_AHEAD", 3 * size)
    prepared = prepare_sweep(_streamed(_Loader(line_task())), _lanes(), 200)
    assert prepared.plan.reports[:3] == [3, 6, 9]
