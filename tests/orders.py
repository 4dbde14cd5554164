"""The order of samples of a data set that is one bucket, for tests that say which sample comes when."""

from mm.data.plan import Bucket, PlannedSource, SamplingPlan


def sample_at(position: int, num_samples: int, seed: int) -> tuple[int, int]:
    """The (sample index, epoch) at a position of the endless walk, as training draws it."""
    bucket = Bucket("samples from 0", num_samples, lambda k: k, lambda _: 1)
    (sample,) = SamplingPlan([PlannedSource([bucket])], seed).group(position)
    return sample.index, sample.draw


def epoch_order(epoch: int, num_samples: int, seed: int) -> list[int]:
    """The samples of one epoch in order."""
    return [sample_at(epoch * num_samples + place, num_samples, seed)[0] for place in range(num_samples)]
