"""GNDM against DMD with an exact teacher, so that differences come from the method alone.

    python benchmarks/analytic_study.py --work_dir analytic-study

The teacher is a class-conditional mixture of Gaussians fitted to scikit-learn's 8x8 digits, whose posterior mean is
known in closed form; student and fake score are small perceptrons that start from one denoiser trained on the teacher's
samples. Every row of `ROWS` runs with the same seeds, so with the same start, initial noises and re-noisings, as the
vanilla DMD that it is compared with, at equal student updates, rollouts and fake-score updates.

Writes the Fréchet and the sliced Wasserstein distance to the teacher, per class, of every run, and 100 ln(distance /
vanilla's) of every row, mean and standard error over the seeds. Runs that are finished are kept in `--work_dir`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import torch
from analytic_teacher import (
    CLASSES,
    COMPONENTS,
    DIMENSIONS,
    SHAPE,
    ExactDenoiser,
    LearnedDenoiser,
    Mixture,
    fit_mixture,
)
from diffusers.training_utils import EMAModel
from runs import paired_change, write_result
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rdm_diffusers.distillation import (
    GNDM,
    Draws,
    collect_samples,
    draw_samples,
    estimate_reward,
    fake_score_direction,
    renoising_times,
    rollout,
    trained_places,
)
from rdm_diffusers.families import Conditioning
from rdm_diffusers.families.sd_unet import StableDiffusionFamily
from rdm_diffusers.frechet import GaussianStatistics, frechet_distance
from rdm_diffusers.networks import FAKE_SCORE, STUDENT, TEACHER, SeparateNetworks
from rdm_diffusers.prediction import denoising_weight
from rdm_diffusers.schedulers import RdmScheduler

METRICS = ("fd", "sw2")


@dataclass(frozen=True)
class Settings:
    """One run's settings; the defaults are vanilla DMD, whose distance is lowest about these learning rates.

    Args:
        group_size, gndm_lambda, normalization, bias_estimator: the objective's.
        fake_updates: fake-score updates per student update.
        num_steps: K, the student's.
        guidance_scale: the teacher's.
        prediction_type: what the perceptrons put out; `flow_prediction` makes the noise schedule flow.
        updates: of the student.
        batch: M, samples per update of either network.
        learning_rate, fake_learning_rate: Adam's, constant.
        ema_decay: of the moving average that is measured.
        width: of the perceptrons' two hidden layers.
        pretraining_updates: of the denoiser that both start from.
        points: how many per class are measured.
    """

    group_size: int = 8
    gndm_lambda: float = 0.0
    normalization: str = "sample"
    bias_estimator: str = "noise"
    fake_updates: int = 5
    num_steps: int = 4
    guidance_scale: float = 1.0
    prediction_type: str = "v_prediction"
    updates: int = 1000
    batch: int = 256
    learning_rate: float = 1e-4
    fake_learning_rate: float = 1e-3
    ema_decay: float = 0.99
    width: int = 128
    pretraining_updates: int = 3000
    points: int = 5000


VANILLA = Settings()
GROUPED = replace(VANILLA, gndm_lambda=0.5, normalization="group")
SHIFT = replace(GROUPED, gndm_lambda=1.0, bias_estimator="shift")
ROWS: dict[str, tuple[Settings, str]] = {  # the row's settings, and the vanilla row that it is compared with
    "start": (replace(VANILLA, updates=0), "vanilla"),
    "vanilla": (VANILLA, "vanilla"),
    "vanilla-group-1": (replace(VANILLA, group_size=1), "vanilla"),  # no two samples share class and step by design
    "normalization-group": (replace(VANILLA, normalization="group"), "vanilla"),
    "normalization-batch": (replace(VANILLA, normalization="batch"), "vanilla"),
    "normalization-none": (replace(VANILLA, normalization="none"), "vanilla"),
    "gndm": (GROUPED, "vanilla"),
    "gndm-lambda-.25": (replace(GROUPED, gndm_lambda=0.25), "vanilla"),
    "gndm-group-2": (replace(GROUPED, group_size=2), "vanilla"),
    "gndm-group-4": (replace(GROUPED, group_size=4), "vanilla"),
    "gndm-group-16": (replace(GROUPED, group_size=16), "vanilla"),
    "gndm-shift": (SHIFT, "vanilla"),
}
VARIANTS: dict[str, dict] = {  # settings that vanilla DMD is run with too, where need be at a rate that suits it better
    "ratio-1": {"fake_updates": 1},
    "ratio-2-group-4": {"fake_updates": 2, "group_size": 4},
    "guidance-3": {"guidance_scale": 3.0},
    "guidance-3-10-times-the-rate": {"guidance_scale": 3.0, "learning_rate": 10 * VANILLA.learning_rate},
    "flow": {"prediction_type": "flow_prediction"},
    "2-steps": {"num_steps": 2, "learning_rate": 4 * VANILLA.learning_rate},
    "1-step": {"num_steps": 1, "learning_rate": 10 * VANILLA.learning_rate},
    "4-times-the-rate": {"learning_rate": 4 * VANILLA.learning_rate},
    "3-times-the-updates": {"updates": 3 * VANILLA.updates},
}
for variant, changes in VARIANTS.items():
    ROWS[f"vanilla-{variant}"] = (replace(VANILLA, **changes), f"vanilla-{variant}")
    ROWS[f"gndm-{variant}"] = (replace(GROUPED, **changes), f"vanilla-{variant}")
ROWS["gndm-shift-ratio-1"] = (replace(SHIFT, fake_updates=1), "vanilla-ratio-1")


@dataclass(frozen=True)
class Problem:
    """A row's networks and sampler."""

    settings: Settings
    mixture: Mixture
    networks: SeparateNetworks
    scheduler: RdmScheduler

    def training_times(self, uniform: Tensor) -> Tensor:
        """Uniform over the training timesteps; for flow never quite 0, where the output is undefined."""
        t = uniform * self.networks.schedule.num_train_timesteps
        return t.clamp(min=1) if self.networks.schedule.is_flow else t.long()


def one_hot(labels: Tensor) -> Conditioning:
    """Classes `[B]` as what the denoisers are conditioned on."""
    return Conditioning({"prompt_embeds": nn.functional.one_hot(labels, CLASSES).float()})


def make_problem(settings: Settings, tensors: dict[str, Tensor], seed: int) -> Problem:
    """Untrained networks beside the exact teacher, and the sampler of the row."""
    scheduler = RdmScheduler(prediction_type=settings.prediction_type)
    scheduler.set_timesteps(settings.num_steps)
    schedule, mixture = scheduler.schedule, Mixture(**{name: tensor.float() for name, tensor in tensors.items()})
    torch.manual_seed(seed)
    denoisers = {
        STUDENT: LearnedDenoiser(schedule, settings.width),
        FAKE_SCORE: LearnedDenoiser(schedule, settings.width),
        TEACHER: ExactDenoiser(mixture, schedule, settings.prediction_type),
    }
    null = Conditioning({"prompt_embeds": torch.zeros(1, CLASSES)})
    networks = SeparateNetworks(
        denoisers,
        family=StableDiffusionFamily(),
        schedule=schedule,
        prediction_type=settings.prediction_type,
        null_conditioning=null,
        guidance_scale=settings.guidance_scale,
    )
    return Problem(settings, mixture, networks, scheduler)


def pretrain(problem: Problem, seed: int) -> None:
    """Teaches the student to denoise the teacher's samples; the rate falls to 0 along a cosine."""
    networks = problem.networks
    optimizer = torch.optim.Adam(networks.parameters(STUDENT), 2e-3, fused=True)
    updates = problem.settings.pretraining_updates
    annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        labels = torch.randint(CLASSES, (512,), generator=generator)
        x0 = problem.mixture.sample(labels, generator).view(-1, *SHAPE)
        t = problem.training_times(torch.rand(512, generator=generator))
        noise = torch.randn(x0.shape, generator=generator)
        denoise(networks, STUDENT, x0, t, noise, one_hot(labels))
        optimizer.step()
        optimizer.zero_grad()
        annealing.step()


def denoise(networks: SeparateNetworks, role: str, x0: Tensor, t: Tensor, noise: Tensor, classes: Conditioning) -> None:
    """Accumulates the gradient of the role's denoising loss on points `[B, ...]` at times `[B]`."""
    schedule = networks.schedule
    prediction = networks.predict(role, schedule.add_noise(x0, noise, t), t, classes)
    direction, _ = fake_score_direction(prediction, x0, denoising_weight(schedule.sigma(t)), len(x0))
    networks.backward(role, prediction, direction)


def distil(problem: Problem, seed: int) -> None:
    """The training step in its plainest form; leaves the moving average as the student.

    A draw serves the whole batch under the update's number, so rows with other groups get the same noises.
    """
    it, networks = problem.settings, problem.networks
    draws, groups = Draws(seed, group_size=it.batch), it.batch // it.group_size
    objective = GNDM(
        group_size=it.group_size, gndm_lambda=it.gndm_lambda, advantage_normalization=it.normalization,
        bias_estimator=it.bias_estimator,
    )  # fmt: skip
    rates = {STUDENT: it.learning_rate, FAKE_SCORE: it.fake_learning_rate}
    optimizers = {role: torch.optim.Adam(networks.parameters(role), rate, fused=True) for role, rate in rates.items()}
    average = EMAModel(networks.parameters(STUDENT), decay=it.ema_decay)

    def update_weights(role: str) -> None:
        optimizers[role].step()
        optimizers[role].zero_grad()

    for update in range(it.updates):
        choice = draws.generator("classes and steps", update)
        labels, steps = (torch.randint(count, (groups,), generator=choice) for count in (CLASSES, it.num_steps))
        classes = one_hot(labels.repeat_interleave(it.group_size))
        noise = (draws.normal(f"rollout/{k}", [update], SHAPE) for k in range(it.num_steps))
        states = rollout(partial(networks.predict, STUDENT), problem.scheduler, noise, classes)
        samples = collect_samples(states, trained_places([[k] for k in steps.tolist()], it.group_size), classes)
        tau = renoising_times(draws.uniform("tau", [update]), networks.schedule)
        estimate = estimate_reward(networks, samples, tau, draws.normal("tau noise", [update], SHAPE))
        x0 = networks.predict(STUDENT, samples.x_t, samples.t, samples.conditioning)
        networks.backward(STUDENT, x0, objective.direction(estimate))
        update_weights(STUDENT)
        average.step(networks.parameters(STUDENT))
        for again in range(it.fake_updates):
            t = problem.training_times(draws.uniform(f"fake time/{again}", [update]))
            noises = draws.normal(f"fake noise/{again}", [update], SHAPE)
            denoise(networks, FAKE_SCORE, samples.x0, t, noises, samples.conditioning)
            update_weights(FAKE_SCORE)
    average.copy_to(networks.parameters(STUDENT))


@torch.no_grad()
def draw(problem: Problem, role: str, scheduler: RdmScheduler, seed: int) -> Tensor:
    """The role's points `[classes, points, D]`, a class at a time."""
    generator, count = torch.Generator().manual_seed(seed), problem.settings.points
    predict, parts = partial(problem.networks.predict, role), []
    for label in range(CLASSES):
        # One noise more than is needed, as when the results were measured: the next class's come after it.
        noise = [torch.randn(count, *SHAPE, generator=generator) for _ in range(len(scheduler.timesteps) + 1)]
        points = draw_samples(predict, scheduler, noise, one_hot(torch.full((count,), label)), micro_batch_size=1000)
        parts.append(points.flatten(1))
    return torch.stack(parts)


def teacher_points(problem: Problem) -> Tensor:
    """The teacher's points `[classes, points, D]`: exact where it is unguided, else from its deterministic sampler."""
    if problem.settings.guidance_scale == 1:
        labels = torch.arange(CLASSES).repeat_interleave(problem.settings.points)
        points = problem.mixture.sample(labels, torch.Generator().manual_seed(1))
        return points.view(CLASSES, -1, DIMENSIONS)
    scheduler = RdmScheduler(prediction_type=problem.settings.prediction_type, eta=0.0)
    scheduler.set_timesteps(100)
    return draw(problem, TEACHER, scheduler, seed=1)


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 64) -> float:
    """The sliced 2-Wasserstein distance of two sets of points `[N, D]`, over fixed directions."""
    along = torch.randn(a.shape[1], directions, generator=torch.Generator().manual_seed(0))
    along = along / along.norm(dim=0)
    return float(((a @ along).sort(0).values - (b @ along).sort(0).values).square().mean().sqrt())


def measure(points: Tensor, reference: Tensor) -> dict[str, float]:
    """Both distances of points `[classes, N, D]` to the teacher's, mean over the classes."""
    pairs = list(zip(points, reference, strict=True))
    return {
        "fd": mean(frechet_distance(GaussianStatistics.of(a), GaussianStatistics.of(b)) for a, b in pairs),
        "sw2": mean(sliced_wasserstein(a, b) for a, b in pairs),
    }


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in a file, which `make` gives if it is not there yet."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(make(), unfinished := path.with_suffix(f".{os.getpid()}"))
        unfinished.rename(path)
    return load_file(path)


def prepare(settings: Settings, seed: int, work_dir: Path) -> Problem:
    """The run's problem with both perceptrons at their common start, which is trained only once per seed."""
    torch.set_num_threads(1)
    problem = make_problem(settings, kept(work_dir / "teacher.safetensors", fit_mixture), seed)
    student = problem.networks.denoisers[STUDENT]

    def start() -> dict[str, Tensor]:
        pretrain(problem, seed)
        return student.state_dict()

    name = f"start-{settings.prediction_type}-{settings.width}-{settings.pretraining_updates}-{seed}.safetensors"
    weights = kept(work_dir / name, start)
    for role in (STUDENT, FAKE_SCORE):
        problem.networks.denoisers[role].load_state_dict(weights)
    return problem


def reference(problem: Problem, work_dir: Path) -> Tensor:
    """The teacher's points, drawn only once per guidance."""
    it = problem.settings
    name = f"points-{it.prediction_type}-{it.guidance_scale}-{it.points}.safetensors"
    return kept(work_dir / name, lambda: {"points": teacher_points(problem).contiguous()})["points"]


def run(row: str, settings: Settings, seed: int, work_dir: Path) -> dict:
    """Trains and measures one row with one seed, unless that is done already with the same settings."""
    path = work_dir / f"{row}-{seed}.json"
    if path.exists() and (record := json.loads(path.read_text()))["settings"] == asdict(settings):
        return record
    problem = prepare(settings, seed, work_dir)
    points = reference(problem, work_dir)
    started = time.process_time()
    distil(problem, seed)
    seconds = time.process_time() - started
    measured = measure(draw(problem, STUDENT, problem.scheduler, seed=2), points)
    record = {"settings": asdict(settings), **measured, "cpu_seconds": seconds}
    path.write_text(json.dumps(record))
    print(f"{row}, seed {seed}: FD {record['fd']:.4f}, sliced W2 {record['sw2']:.4f}, {seconds:.0f} s", flush=True)
    return record


def run_all(settings: dict[str, Settings], seeds: int, jobs: int, work_dir: Path) -> dict[str, list[dict]]:
    """Every row's results, one per seed; what rows share is made first, so that they only read it."""
    starts = {s.prediction_type: s for s in settings.values()}.values()
    targets = {(s.prediction_type, s.guidance_scale): s for s in settings.values()}.values()
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:

        def wait(function: Callable, *columns: Sequence) -> list:
            return list(pool.map(function, *columns, repeat(work_dir)))

        wait(prepare, *zip(*product(starts, range(seeds)), strict=True))
        wait(draw_reference, targets)
        every = [(name, s, seed) for seed in range(seeds) for name, s in settings.items()]
        results = wait(run, *zip(*every, strict=True))
    return {name: results[i :: len(settings)] for i, name in enumerate(settings)}


def draw_reference(settings: Settings, work_dir: Path) -> None:
    """Makes the file that `reference` reads."""
    reference(prepare(settings, 0, work_dir), work_dir)


def float32_error(work_dir: Path, points: int = 2000) -> float:
    """The largest difference of the exact denoiser in float32 from itself in float64, over points at all times."""
    tensors = load_file(work_dir / "teacher.safetensors")
    exact, single = Mixture(**tensors), Mixture(**{name: tensor.float() for name, tensor in tensors.items()})
    schedule, generator = RdmScheduler(prediction_type="v_prediction").schedule, torch.Generator().manual_seed(0)
    labels, t = (torch.randint(n, (points,), generator=generator) for n in (CLASSES, schedule.num_train_timesteps))
    x0 = exact.sample(labels, generator)
    x_t = schedule.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
    inputs = (x_t, schedule.alpha(t), schedule.sigma(t), one_hot(labels).tensors["prompt_embeds"])
    difference = exact.posterior_mean(*(value.double() for value in inputs)) - single.posterior_mean(*inputs)
    return float(difference.abs().max())


def paired(results: list[dict], vanilla: list[dict], metric: str) -> dict:
    """Means of both, and 100 ln(row / vanilla) with its standard error over the seeds."""
    values, baseline = ([result[metric] for result in each] for each in (results, vanilla))
    return {"mean": mean(values), "vanilla": mean(baseline), **paired_change(values, baseline)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--updates", type=int, default=VANILLA.updates, help="of the student, where a row has no more")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--work_dir", type=Path, required=True, help="where the runs go; finished ones are kept")
    args = parser.parse_args()
    names = [name for name in ROWS if name in args.rows or name in {ROWS[row][1] for row in args.rows}]
    settings = {name: ROWS[name][0] for name in names}
    settings = {n: replace(s, updates=s.updates * args.updates // VANILLA.updates) for n, s in settings.items()}
    results = run_all(settings, args.seeds, args.jobs, args.work_dir)
    rows = {
        name: {
            "settings": asdict(settings[name]),
            "compared_with": ROWS[name][1],
            **{metric: paired(results[name], results[ROWS[name][1]], metric) for metric in METRICS},
            "seeds": [{key: result[key] for key in (*METRICS, "cpu_seconds")} for result in results[name]],
        }
        for name in names
    }
    teacher = {"classes": CLASSES, "dimensions": DIMENSIONS, "components_per_class": COMPONENTS}
    write_result("analytic_study", {"teacher": teacher, "float32_error": float32_error(args.work_dir), "rows": rows})
    print_table(rows)


def print_table(rows: dict[str, dict]) -> None:
    """The paired summary in Markdown."""
    print("| row | FD | 100 ln(FD / vanilla's) | sliced W2 | 100 ln(W2 / vanilla's) |\n|---|---|---|---|---|")
    for name, row in rows.items():
        change, error = ([row[metric][key] or 0 for metric in METRICS] for key in ("change_100_ln", "standard_error"))
        cells = [f"{row[m]['mean']:.3f} | {c:+.0f} ± {e:.0f}" for m, c, e in zip(METRICS, change, error, strict=True)]
        print(f"| {name} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
