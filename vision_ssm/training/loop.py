"""The one training loop: steps, accumulation, clipping, average, evaluation, checkpoints, exact resume."""

import time
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from vision_ssm.config import to_dict
from vision_ssm.errors import UserError
from vision_ssm.training import runs
from vision_ssm.training.batches import BatchStream, iterate_batches, load_batch, seed_everything
from vision_ssm.training.compiled import compile_network
from vision_ssm.training.config import TrainConfig
from vision_ssm.training.ema import Ema, PowerEma
from vision_ssm.training.environment import lost_peer, make_accelerator, out_of_memory_message, train_mode
from vision_ssm.training.graphs import GraphedNetwork
from vision_ssm.training.guard import NonFiniteGuard, name_non_finite
from vision_ssm.training.interrupt import StopRequest
from vision_ssm.training.log import Row, RunLog
from vision_ssm.training.meter import Meter
from vision_ssm.training.optim import build_optimizer, set_rates
from vision_ssm.training.plan import Plan
from vision_ssm.training.task import RunInfo, Task

_STATE = {"step", "model", "optimizer", "meter", "best", "history", "same"}
"""What `last` keeps besides the average."""
CHECK_EVERY = 20
"""Steps between two looks of the host at the device (losses for the bar, the guard, stop requests)."""


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    run_dir: Path
    best: Path | None
    """Folder of the best checkpoint; None if no evaluation gave a finite score."""
    last: Path
    metrics: Row
    """Of the best epoch, with its number as ``epoch``."""
    history: list[Row]
    """One row per epoch, as in ``metrics.csv``."""


def train(task: Task, config: TrainConfig, *, resume: Path | None = None) -> TrainResult:
    """Train a model, in one process or in each of those that torchrun started.

    Args:
        task: What to train on what.
        config: How.
        resume: Folder of a run to go on with as if it had never stopped; None starts a new run. Order and content of
            the batches and all random numbers are the same; so are the losses, to the last bit on the CPU and on a GPU
            as far as its kernels are deterministic.

    Raises:
        UserError: a loss that is not finite, too little GPU memory, unreadable data, nothing to resume; another process
            of the run has ended.
        SystemExit: stopped by Ctrl-C (130) or SIGTERM (143); the state is saved.
    """
    accelerator = make_accelerator(config)
    try:
        with StopRequest() as stop:
            trainer = _Trainer(task, config, accelerator, stop)
            trainer.prepare(None if resume is None else Path(resume))
            result = trainer.run()
    except torch.OutOfMemoryError:
        raise UserError(out_of_memory_message(config, accelerator)) from None
    except TorchDynamoException as error:
        reason = str(getattr(error, "inner_exception", error)).strip().partition("\n")[0]
        raise UserError(f"the network cannot be compiled ({reason}); train without --train.compile") from None
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not lost_peer(error):
            raise
        raise UserError("stopped, because another process of this run has ended: its message says why") from None
    accelerator.end_training()
    return result


class _Trainer:
    """The state of a run, and the loop over it."""

    def __init__(self, task: Task, config: TrainConfig, accelerator: Accelerator, stop: StopRequest) -> None:
        self.task, self.config, self.accelerator, self.stop = task, config, accelerator, stop
        self.device, self.processes = accelerator.device, accelerator.num_processes
        self.data = task.train_data()
        samples = len(self.data)  # type: ignore[arg-type]
        self.plan = Plan.of(config, samples)
        self.stream = BatchStream(
            samples,
            batch_size=config.batch_size,
            seed=config.seed,
            stop=self.plan.batch_at(self.plan.steps),
            rank=accelerator.process_index,
            processes=self.processes,
        )
        seed_everything(config.seed, device=self.device)
        self.raw = task.build().to(self.device)
        self.optimizer = build_optimizer(self.raw, config.optim, config.scaled_weight_decay)
        self.ema = Ema(self.raw, config.ema)
        self.averages = {f"{width:g}": PowerEma(self.raw, width) for width in config.ema.power_widths}
        self.model = accelerator.prepare_model(self.raw)
        accelerator.prepare_model(self.ema.module, evaluation_mode=True)
        train_mode(self.model)
        if config.compile:  # the averages, which are evaluated, stay as they are
            compile_network(self.raw)
        self.graphs = self._graphs()
        self.guard = NonFiniteGuard(self.device)
        self.meter = Meter()
        self.step = self.first_step = 0
        self.best: Row = {}
        self.history: list[Row] = []
        self.stop_signal = 0

    def prepare(self, resume: Path | None) -> None:
        """Make the folder of a new run, or take up the state of an old one."""
        if resume is None:
            self.run_dir = self._new_run_dir()
        else:
            self.run_dir = resume
            self._restore()
        self.last = self.run_dir / "last"

    def run(self) -> TrainResult:
        """Train from the present step to the end."""
        self.log = RunLog(self.run_dir, self.history, step=self.step, enabled=self.accelerator.is_main_process)
        batches = self._batches()
        try:
            self.log.say(self._greeting())
            ended = self._stopped_before_evaluation() and self._finish_epoch()
            while not ended and self.step < self.plan.steps:
                self._train_epoch(batches)
                ended = self._finish_epoch()
        finally:
            batches.close()  # ends the workers, which heed no signal
            self.log.close()
        best = self.run_dir / "best" if self.best else None
        return TrainResult(self.run_dir, best, self.last, self.best, self.history)

    def _train_epoch(self, batches: Iterator[Any]) -> None:
        epoch, done = divmod(self.step, self.plan.steps_per_epoch)
        self.log.start_epoch(f"epoch {epoch + 1}/{self.plan.epochs}", steps=self.plan.steps_per_epoch, done=done)
        if done == 0:
            self.meter = Meter()
        while True:
            clock = time.perf_counter()
            self._train_step(batches)
            self.log.advance()
            ends = self.plan.ends_epoch(self.step)
            if ends or self.step % CHECK_EVERY == 0 or (self.stop.signal and self.processes == 1):
                self._look()
            self.meter.seconds += time.perf_counter() - clock
            if ends:
                return
            if self.stop_signal:
                self._save_last()
                self._quit()
            if self.config.save_every and self.step % self.config.save_every == 0:
                self._save_last()

    def _train_step(self, batches: Iterator[Any]) -> None:
        config, first = self.config, self.plan.batch_at(self.step)
        end = self.plan.batch_at(self.step + 1)
        # DDP averages over the processes, backward adds over the batches
        scale = self.processes if self.task.loss_reduction == "sum" else 1 / (end - first)
        total = torch.zeros((), device=self.device)
        for number in range(first, end):
            batch = self._next(batches)
            with nullcontext() if number == end - 1 else self.accelerator.no_sync(self.model):
                losses = self._loss(self.graphs or self.model, batch, number)
                self.accelerator.backward(losses["loss"] * scale)
            if self.graphs and number < end - 1:
                self.graphs.own_gradients()
            self.meter.add(losses)
            total += losses["loss"].detach()
        norm = nn.utils.clip_grad_norm_(self.raw.parameters(), config.clip or float("inf"))
        self.optimizer.found_inf = self.guard.observe(self._everywhere(torch.isfinite(total + norm)))  # type: ignore[attr-defined]
        set_rates(
            self.optimizer,
            config.optim,
            config.schedule,
            done=self.step / self.plan.steps,
            warm=self.plan.warm(self.step, config.schedule),
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        for average in (self.ema, *self.averages.values()):
            average.update(self.raw, self.step)

    def _graphs(self) -> GraphedNetwork | None:
        if not self.config.graph or self.device.type != "cuda":
            return None
        if self.processes > 1:
            raise UserError(f"train.graph is for one process, there are {self.processes}; train without it")
        return GraphedNetwork(self.model)

    def _everywhere(self, flag: Tensor) -> Tensor:
        if self.processes == 1:
            return flag
        failures: Tensor = self.accelerator.reduce((~flag).float())  # type: ignore[assignment]
        return failures == 0

    def _loss(self, model: nn.Module, batch: Any, number: int) -> dict[str, Tensor]:
        seed_everything(self.config.seed, number, self.accelerator.process_index, device=self.device)
        return self.task.loss(model, batch)

    def _batches(self) -> Generator[Any]:
        self.stream.start = self.plan.batch_at(self.step)
        pin = self.device.type == "cuda"
        batches = iterate_batches(
            self.data, self.stream, self.task.collate, workers=self.config.workers, pin_memory=pin
        )
        for number, batch in enumerate(batches, start=self.stream.start):
            if number == 0 and self.accelerator.is_main_process:
                self.task.first_batch(batch, self.run_dir)
            yield batch

    def _next(self, batches: Iterator[Any]) -> Any:
        clock = time.perf_counter()
        batch = next(batches)
        self.meter.waited += time.perf_counter() - clock
        return send_to_device(batch, self.device, non_blocking=True)

    def _look(self) -> None:
        """Let the host see what happened on the device and in the other processes."""
        self._stop_if_not_finite()
        self.log.show(self.meter)
        self._agree_to_stop()

    def _agree_to_stop(self) -> None:
        self.stop_signal = self.stop.signal
        if self.processes > 1:  # all stop at the same step, so that none waits for one that is gone
            self.stop_signal = max(gather_object([self.stop.signal]))

    def _stop_if_not_finite(self) -> None:
        good = self.guard.steps_before_first_bad()
        if good is None:
            return
        step, found = self.first_step + good, None
        for number in range(self.plan.batch_at(step), self.plan.batch_at(step + 1)):
            batch = send_to_device(load_batch(self.data, self.stream, self.task.collate, number), self.device)
            found = found or name_non_finite(self.raw, lambda model, b=batch, n=number: self._loss(model, b, n), batch)
        if self.processes > 1:
            found = next((name for name in gather_object([found]) if name), None)
        where = f"the first value that is not finite is {found}" if found else "repeating the step gave finite values"
        kept = f"the last good checkpoint is {self.last}" if self.last.exists() else "no checkpoint was written yet"
        raise UserError(
            f"loss or gradient became NaN or infinite at step {step + 1}, epoch {step // self.plan.steps_per_epoch + 1}"
            f": {where}; {kept}. Lower the learning rate (now {self.config.optim.lr:g}), lengthen the warm-up, or "
            f"train with precision fp32 (now {self.config.precision})"
        )

    def _quit(self) -> None:
        self.log.end_bar()
        self.log.say(f"stopped at step {self.step} of {self.plan.steps}; {self.run_dir} can be resumed")
        raise SystemExit(128 + self.stop_signal)

    def _finish_epoch(self) -> bool:
        """Evaluate, log and save; True if the run ends here although it is not over."""
        self.log.end_bar()
        epoch, ends = -(-self.step // self.plan.steps_per_epoch), self.step == self.plan.steps
        row = self._row(epoch)
        evaluated = ends or epoch % self.config.val_every == 0
        if evaluated:
            self._save_last()  # an evaluation may fail, and the epoch must not be lost with it
            metrics = self._evaluate(epoch)
            row |= {f"val/{name}": value for name, value in metrics.items()}
            if self._is_better(metrics[self.task.primary]):
                self.best = {"epoch": epoch, **metrics}
                self._save(self.run_dir / "best")
            for name, average in self.averages.items():
                self._save(self.run_dir / "averages" / name, average=average)
        self.log.end_epoch(row, f"epoch {epoch}/{self.plan.epochs}")
        self._agree_to_stop()  # again: an evaluation can take minutes
        patience = self.config.patience
        stale = patience is not None and bool(self.best) and epoch - self.best["epoch"] >= patience
        if evaluated or stale or self.stop_signal or epoch % self.config.save_epochs == 0:
            self._save_last()
        if ends:
            return False
        if self.stop_signal:
            self._quit()
        if stale:
            self.log.say(f"stopped early: {self.task.primary} has been best at epoch {self.best['epoch']}")
        return stale

    def _stopped_before_evaluation(self) -> bool:
        """Whether a resumed run ended between the last step of an epoch and its row."""
        done = int(self.history[-1]["step"]) if self.history else 0
        return self.step > done and self.plan.ends_epoch(self.step)

    def _row(self, epoch: int) -> Row:
        images = self.meter.batches * self.config.batch_size
        row: Row = {"epoch": epoch, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= {f"train/{name}": value for name, value in self._mean_losses().items()}
        row |= {"seconds": self.meter.seconds, "images_per_s": images / self.meter.seconds}
        row["data_wait"] = self.meter.waited / self.meter.seconds
        if self.device.type == "cuda":
            row["gpu_memory_gb"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return row

    def _mean_losses(self) -> Row:
        if self.processes > 1:
            self.meter.sums = self.accelerator.reduce(self.meter.sums, "mean")  # type: ignore[assignment]
        means = self.meter.means()
        if self.task.loss_reduction == "sum":
            means["loss"] *= self.processes
        return means

    def _evaluate(self, epoch: int) -> Row:
        shared: list[Any] = [None]
        if self.accelerator.is_main_process:
            seed_everything(self.config.seed, self.step, device=self.device)
            run = RunInfo(self.run_dir, self.device, epoch, self.plan.epochs, self.step)
            try:
                with torch.no_grad():
                    metrics = self.task.evaluate(self.ema.module, run)
            except UserError as error:
                raise UserError(f"{error}. Epoch {epoch} is saved in {self.last}, the run can be resumed") from None
            if self.task.primary not in metrics:
                raise KeyError(f"{self.task.primary!r}, the primary metric, is not among {list(metrics)}")
            shared = [{name: float(value) for name, value in metrics.items()}]
        return broadcast_object_list(shared)[0]

    def _is_better(self, score: float) -> bool:
        best = self.best.get(self.task.primary, float("-inf" if self.task.higher_is_better else "inf"))
        return score > best if self.task.higher_is_better else score < best

    def _new_run_dir(self) -> Path:
        made = [str(runs.new_run_dir(self.config.run_dir)) if self.accelerator.is_main_process else ""]
        return Path(broadcast_object_list(made)[0])

    def _save_last(self) -> None:
        self._stop_if_not_finite()
        self._mean_losses()  # brings the sums of all processes together
        state = {
            "step": self.step,
            "model": self.raw.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "meter": self.meter.state(),
            "best": self.best,
            "history": self.history,
            "same": self._same(),
            "averages": {name: average.module.state_dict() for name, average in self.averages.items()},
        }
        self._save(self.last, state)

    def _save(self, folder: Path, state: dict[str, Any] | None = None, average: ModelEmaV3 | None = None) -> None:
        if self.accelerator.is_main_process:
            trained = {"step": self.step, "steps": self.plan.steps, "best": self.best}
            about = {"train": to_dict(self.config), "trained": trained}
            weights = (average or self.ema).module.state_dict()
            runs.save(folder, weights, {**self.task.config(), **about}, state)
        self.accelerator.wait_for_everyone()

    def _same(self) -> dict[str, Any]:
        # with any of these changed, other batches would follow than in the run that goes on
        return {
            "batch_size": self.config.batch_size,
            "batches per step": self.plan.accumulate,
            "seed": self.config.seed,
            "training samples": self.stream.length,
            "processes": self.processes,
        }

    def _restore(self) -> None:
        average, state = runs.load(self.run_dir / "last")
        if missing := _STATE - set(state):
            raise UserError(
                f"{self.run_dir} cannot be resumed: its state lacks {', '.join(sorted(missing))}; start a new run from "
                f"the weights in {self.run_dir / 'last'}"
            )
        now = self._same()
        changed = [
            f"{name} was {was} and is {now[name]} now" for name, was in state["same"].items() if was != now[name]
        ]
        if changed:
            raise UserError(f"cannot resume {self.run_dir}: {', '.join(changed)}; resume it as it was started")
        logged = bool(state["history"]) and state["history"][-1]["step"] == state["step"]
        if state["step"] >= self.plan.steps and logged:
            raise UserError(
                f"{self.run_dir} is finished ({state['step']} of {self.plan.steps} steps); "
                f"to train longer, start a new run from the weights in {self.run_dir / 'last'}"
            )
        try:
            self.raw.load_state_dict(state["model"])
            self.ema.module.load_state_dict(average)
            self.optimizer.load_state_dict(state["optimizer"])
            for name, average in self.averages.items():
                average.module.load_state_dict(state["averages"][name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.run_dir} holds another model or optimiser than this one: {error}") from None
        self.meter = Meter.of(state["meter"], self.device)
        self.best, self.history = state["best"], state["history"]
        self.step = self.first_step = state["step"]

    def _greeting(self) -> str:
        parts = sum(parameter.numel() for parameter in self.raw.parameters())
        trained = sum(parameter.numel() for parameter in self.raw.parameters() if parameter.requires_grad)
        begin = f"from step {self.step + 1}" if self.step else "from the beginning"
        graphs = ", CUDA graphs" if self.graphs else ", no graphs: there is no GPU" if self.config.graph else ""
        return (
            f"{self.run_dir}: {trained:,} of {parts:,} parameters, {self.stream.length} samples, {self.plan.epochs} "
            f"epochs ({self.plan.steps} steps of {self.config.batch_size} x {self.plan.accumulate}) {begin}, "
            f"{self.processes} x {self.device.type}, {self.config.precision}{graphs}"
        )
