"""A run, step by step: it is checked, loaded, trained, exported, evaluated and pushed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import LoraStudentConfig, RunConfig
from ..config.record import training_record
from ..config.subjects import ON_THE_FLY
from ..families import Teacher
from ..folders import write_whole
from ..hub import export_full, export_lora
from ..networks import STUDENT, Networks, SeparateNetworks
from ..report import Report
from ..rewards import Function, WeightedReward, functions_by_name
from . import quality
from .assembly import load, make_distillation, make_state, networks_of_run
from .best import load_best
from .buckets import with_buckets
from .callbacks import Callback
from .checkpoint_files import read_record
from .checkpoints import TrainState
from .contrast import teacher_contrast
from .epochs import with_updates
from .external_rewards import load_rewards, with_reward_funcs
from .finish import draw_and_measure
from .launch import make_accelerator
from .loss_scaling import scalers_of
from .memory_plan import plan_memory
from .memory_table import MemoryPlan
from .pictures import images_of_run, with_pictures
from .prompts import Texts, load_prompts, read_texts
from .publish import check_hub, publish
from .run import Distillation
from .run_folder import (
    arguments_of,
    check_resumable,
    checkpoint_to_resume,
    locked_for_run,
    prepare_output,
    resume_from,
)
from .target import learn_target
from .target_buckets import check_images_of_sizes
from .target_images import TargetImages
from .target_start import start_at_target
from .teacher_checks import check_with_teacher
from .tracking import announcement, end_trackers, start_trackers
from .user_images import UserImages, find_user_images
from .validation import averaged_student, validation_picture, write_picture
from .validation_metrics import ValidationMetrics, load_metrics

CONFIG_FILE = "config.yaml"


@dataclass(frozen=True)
class TrainOutput:
    """How a training ended."""

    updates: int  # how many are done, those before a resumption included
    signal: int  # the number of the signal that ended it early, after a checkpoint; 0 if none did


class Trainer:
    """One run, from its configuration to its student on the Hub.

    The steps are methods, in the order `check`, `load`, `train`, `export`, `evaluate`, `push`; `load` and `train` do
    those before them that have not been done. From the first on, no other run may use the folder, until `close`.

    Args:
        config: the run's, of a LoRA student or a full one.
        callbacks: are called while it trains.
        reward_funcs: rewards beside those of the configuration, whose algorithm is `gndmr`: one or several
            functions `(images, prompts) -> [B]`, or `Reward` objects (docs/rewards.md).
        reward_weights: their weights; 1 each by default.

    Attributes:
        config: as above, with the names of `reward_funcs`.
        folder: the run's.
        accelerator: the device, the processes and the trackers.
        teacher, networks, distillation, state: the teacher; the roles; what stays the same through the run; and
            what every update changes. They are there after `load`, until `evaluate`. The teacher's text encoders
            are dropped in `load`, except where a full student's files are written.
        metrics: what the student is measured with while it trains; None without `--validation_metrics`.

    Raises:
        ValueError, ImportError: one sentence, if the folder, the way it was launched or `reward_funcs` cannot be used.
    """

    teacher: Teacher
    texts: Texts
    networks: Networks
    distillation: Distillation
    state: TrainState
    prompts: list[str]
    images: UserImages | None
    rewards: list[WeightedReward]
    metrics: ValidationMetrics | None
    report: Report | None = None
    checkpoint: Path | None

    def __init__(
        self,
        config: RunConfig,
        callbacks: Sequence[Callback] = (),
        reward_funcs: Function | Sequence[Function] = (),
        reward_weights: Sequence[float] | None = None,
    ) -> None:
        self.reward_funcs = functions_by_name(reward_funcs)
        self.config = config = with_reward_funcs(config, self.reward_funcs, reward_weights)
        self.callbacks = list(callbacks)
        self.folder = prepare_output(config.output)
        self.accelerator = make_accelerator(config.output, config.memory)
        self.arguments: dict[str, Any] = {}
        self.stopping = False
        self._held = ExitStack()
        self._done: set[str] = set()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *error: object) -> None:
        if "train" in self._done and error[0] in (None, SystemExit):
            self.accelerator.state.destroy_process_group()
        self.close()

    def close(self) -> None:
        """Lets other runs use the folder."""
        self._held.close()

    def check(self) -> None:
        """Finds whatever is wrong, before anything long is done.

        Raises:
            ValueError, ImportError, OSError: one sentence on what is wrong and what to do.
        """
        if "check" in self._done:
            return
        try:
            self._check()
        except BaseException:
            self.close()  # so that a corrected run can use the folder at once
            raise
        self._done.add("check")

    def _check(self) -> None:
        config, accelerator = self.config, self.accelerator
        self._held.enter_context(locked_for_run(self.folder, accelerator, changes=not config.output.dry_run))
        self.images = find_user_images(config.prompts)
        if self.images:
            check_images_of_sizes(self.images, config)
        captions = self.images.captions if self.images else ()
        self.prompts = load_prompts(config.prompts, config.teacher.pretrained_model_name_or_path, captions)
        self.config = config = with_updates(config, len(self.prompts), accelerator.num_processes)
        self.checkpoint = checkpoint_to_resume(self.folder, config)
        self.arguments = arguments_of(config, self.prompts, self.images, accelerator.num_processes)
        if self.checkpoint:
            check_resumable(self.arguments, read_record(self.checkpoint)["arguments"])
        check_with_teacher(config)
        check_hub(config, accelerator)
        self.rewards = load_rewards(config, accelerator.device, self.reward_funcs)
        self.metrics = load_metrics(config, self.prompts, self.rewards, accelerator)

    def plan(self) -> MemoryPlan:
        """What memory the run needs, from configurations alone; after `check`, that of its rewards, too."""
        loaded = [weighted.reward for weighted in self.rewards] if "check" in self._done else None
        return plan_memory(self.config, rewards=loaded)

    def load(self) -> None:
        """Loads the teacher, reads the prompts, and makes roles, objective and optimisers; or those of a checkpoint."""
        self.check()
        if "load" in self._done:
            return
        config, accelerator = self.config, self.accelerator
        accelerator.print(announcement(config, accelerator.num_processes))
        self.teacher = load(config, accelerator.device)
        others = self.images.captions if self.images and config.prompts.prompts_file else ()
        self.texts = read_texts(self.teacher, self.prompts, config, accelerator, others)
        self.metrics = self.metrics and self.metrics.encoded(self.teacher, config, accelerator.device)
        needed = accelerator.is_main_process and not config.is_lora  # the files of a full student include them
        if not needed and config.prompts.encode_prompts != ON_THE_FLY:
            self.teacher.drop_text_encoders()
        self.networks = self.make_networks()
        self.distillation = make_distillation(
            self.teacher, self.networks, self.texts, self.rewards, config, accelerator
        )
        self.distillation = with_buckets(self.distillation, self.teacher, config)
        contrast = teacher_contrast(self.distillation, self.teacher, config.output.monitor_images)
        images = images_of_run(self.images, self.distillation, self.teacher, config, accelerator)
        self.distillation = with_pictures(self.distillation, images, config)
        if config.target.teacher_target == "samples":
            self.learn_target(images)
            if self.images is not None and contrast is not None:  # the student's is to be that of the user's images
                contrast = torch.cat([each.latents.float().flatten() for each in images]).std().item()
        self.state = make_state(self.networks, accelerator, config)
        self.distillation.scalers.update(scalers_of(self.state.optimizers))
        self.state.monitor.teacher_contrast = contrast
        if self.checkpoint:
            resume_from(self.checkpoint, self.folder, self.state, accelerator)
        self._done.add("load")

    def make_networks(self) -> Networks:
        """The roles; a subclass may have others."""
        return networks_of_run(self.config, self.teacher, self.texts.nothing, self.accelerator)

    def learn_target(self, images: list[TargetImages]) -> None:
        """Trains the target on the images, or reads what an equal run trained.

        Student and fake score start at the target, but for a student that starts from another LoRA.
        """
        learn_target(self.distillation, images, self.config, self.accelerator, self.folder)
        if not (isinstance(self.config.student, LoraStudentConfig) and self.config.student.init_lora):
            start_at_target(self.networks)

    def train(self) -> TrainOutput:
        """Trains to the end, or until a signal or `stop`, which leave a checkpoint. Writes `config.yaml` before."""
        self.load()
        start_trackers(self.accelerator, self.config)
        if self.accelerator.is_main_process:
            write_whole(self.folder / CONFIG_FILE, self.config.as_yaml())
        number = quality.train_and_report(self)
        end_trackers(self.accelerator)
        self._done.add("train")
        return TrainOutput(self.state.update, number)

    def stop(self) -> None:
        """Ends the training after the current update, with a checkpoint; for callbacks."""
        self.stopping = True

    def validate(self) -> None:
        """Draws the validation prompts with the student as it is. Every process draws, one writes."""
        picture = validation_picture(self.distillation, self.state, self.teacher, self.texts)
        if self.accelerator.is_main_process:
            write_picture(picture, self.state.update, self.folder / "validation", self.accelerator)
            self.notify("on_validation", picture)
        quality.follow_up(self)

    def notify(self, event: str, value: Any) -> None:
        """Calls a method of every callback."""
        for callback in self.callbacks:
            getattr(callback, event)(self, value)

    def export(self) -> Path:
        """Writes the student, as it is now, in files that stock diffusers loads; returns its folder, the run's.

        With `--load_best_model_at_end` it is the best student instead. Every process must call.
        """
        self.load()
        load_best(self)
        writes = self.accelerator.is_main_process
        with averaged_student(self.distillation, self.state):
            weights = self.networks.student_weights(keep=writes)
        if not writes:
            return self.folder
        source, scheduler = self.config.teacher, self.distillation.scheduler
        training = training_record(self.arguments, self.state.update)
        if isinstance(self.networks, SeparateNetworks):
            trained: Any = self.networks.denoisers[STUDENT].config
            export_full(self.folder, self.teacher, weights, trained, scheduler, training)
        else:
            origin = {"revision": source.revision, "variant": source.variant, "training": training}
            base = self.config.student_base
            export_lora(self.folder, self.teacher, weights, scheduler, student_base=base, **origin)
        return self.folder

    def evaluate(self) -> None:
        """Draws with the exported student beside its teacher, on the main process: `samples.png`, `metrics.json`, card.

        The training's networks and rewards are freed first, and the processes part, so that none waits for the main
        one. An error here becomes a warning of one sentence; the student is safe.
        """
        shown = self.texts.shown
        for name in ("teacher", "texts", "networks", "distillation", "state", "rewards"):
            self.__dict__.pop(name, None)
        self.accelerator.state.destroy_process_group()
        if self.accelerator.is_main_process:
            draw_and_measure(self.folder, shown, self.config, self.accelerator.device, self.report)

    def push(self) -> str | None:
        """Pushes the exported student to the Hub, on the main process.

        Returns:
            The commit's address; None on other processes.

        Raises:
            OSError: if the Hub did not take it, with the command that tries again.
        """
        if not self.accelerator.is_main_process:
            return None
        address = publish(self.config)
        print(f"The student is at {address}")
        return address
