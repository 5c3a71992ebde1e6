"""How many batches, steps and epochs a run has; all positions in a run follow from the step number."""

from dataclasses import dataclass

from vision_ssm.training.batches import batches_per_epoch
from vision_ssm.training.config import ScheduleConfig, TrainConfig


@dataclass(frozen=True)
class Plan:
    """The length of a run.

    A step gathers ``accumulate`` batches; the last step of an epoch takes those that are left, so that an epoch is a
    whole number of steps.
    """

    batches_per_epoch: int
    accumulate: int
    steps: int
    """In the whole run."""

    @classmethod
    def of(cls, config: TrainConfig, samples: int) -> "Plan":
        """The plan of a run over ``samples`` training samples."""
        batches = batches_per_epoch(samples, config.batch_size)
        accumulate = min(config.accumulate, batches)
        steps = config.steps or (config.epochs or 0) * -(-batches // accumulate)
        return cls(batches, accumulate, steps)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in a whole epoch."""
        return -(-self.batches_per_epoch // self.accumulate)

    @property
    def epochs(self) -> int:
        """Epochs, the last of which may be cut short."""
        return -(-self.steps // self.steps_per_epoch)

    def batch_at(self, step: int) -> int:
        """Batches that come before this step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return epoch * self.batches_per_epoch + number * self.accumulate

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, is over after ``step`` steps."""
        return step % self.steps_per_epoch == 0 or step == self.steps

    def warm(self, step: int, schedule: ScheduleConfig) -> float:
        """Share of the warm-up that is over with this step (counted from 0)."""
        length = max(round(schedule.warmup_epochs * self.batches_per_epoch), schedule.warmup_min_batches)
        return min(1.0, self.batch_at(step + 1) / length) if length else 1.0
