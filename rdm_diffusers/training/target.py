"""The target: a LoRA on the teacher that learns the score of the images that the guided teacher draws.

A guided score is the score of no distribution (arXiv 2409.13074, arXiv 2408.09000), so that R_dm under guidance leads
to a compromise. The score of the guided teacher's own images is one, and needs one network call where guidance needs
two. Ours, not the paper's.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import RunConfig
from ..config.optimizers import USUAL
from ..distillation import denoising_times, fake_score_direction, posterior_mean
from ..folders import write_whole
from ..networks import TARGET, TEACHER
from ..prediction import denoising_weight
from ..sharding import gather
from .cache_parts import whole_parts, write_part
from .checkpoints import copy_into
from .finite import NonFiniteError
from .loss_scaling import scalers_of
from .optimizers import averaged, make_optimizer, update_average
from .run import Distillation
from .target_images import TargetImages

DAMAGED = "The target in {path} is damaged; it is trained again."
RECORD = "target.json"  # in the run's folder
CHECKS = 10  # of the held-out loss in a whole training
OVERFITTED = 0.01  # so much above the lowest loss is no accident of the times and noises that are checked
PATIENCE = 5  # checks without a lower loss that end it; while the learning rate is high, the loss goes up and down


def learn_target(
    run: Distillation, images: Sequence[TargetImages], config: RunConfig, accelerator: Accelerator, folder: Path
) -> None:
    """Trains the target with the teacher's own denoising loss, or reads what an equal run has trained.

    The weights' moving average is kept: the last one, or the one with the lowest loss on held-out images where that has
    risen clearly since. `target.json` in the run's folder has that loss, and beside it the teacher's own, guided and
    unguided. `images` are those of each size; every update has one size, drawn by its share.

    Raises:
        NonFiniteError: if the loss is not finite.
    """
    parameters = run.networks.parameters(TARGET)
    cache = images[0].folder / f"target-{_digest(run, images, config)}"
    found = whole_parts(cache, DAMAGED)
    if found:
        with safe_open(found[0], "pt") as saved:
            record = json.loads(saved.metadata()["record"])
            for i, parameter in enumerate(parameters):
                copy_into(parameter, saved.get_tensor(str(i)))
    else:
        record = _train(run, images, config, accelerator, parameters)
        weights = {str(i): gather(p.detach()).cpu().contiguous() for i, p in enumerate(parameters)}
        if accelerator.is_main_process:
            cache.mkdir(exist_ok=True)
            write_part(cache, 0, weights, {"record": json.dumps(record)})
    if accelerator.is_main_process:
        write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")
    accelerator.wait_for_everyone()


def _digest(run: Distillation, images: Sequence[TargetImages], config: RunConfig) -> str:
    """Of all that decides the target beside the images."""
    optimisation = config.optimisation
    sizes = [(each.folder.name, each.share) for each in images] if len(images) > 1 else []
    other_optimizer = [] if config.memory.optim == USUAL else [config.memory.optim]
    settings = (
        config.target, getattr(config.student, "quantization", None), sum(map(len, images)), _batch_size(run, config),
        run.num_processes, optimisation.adam_beta1, optimisation.adam_beta2, optimisation.adam_weight_decay,
        optimisation.adam_epsilon, optimisation.max_grad_norm, optimisation.use_ema, optimisation.ema_decay,
        config.memory.mixed_precision, config.memory.use_8bit_adam, *other_optimizer, *sizes,
    )  # fmt: skip
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:32]


def _batch_size(run: Distillation, config: RunConfig) -> int:
    """Images in one process's part of an update of the target."""
    whole = config.target.target_batch_size
    return config.optimisation.samples_per_update if whole is None else -(-whole // run.num_processes)


def _train(
    run: Distillation,
    images: Sequence[TargetImages],
    config: RunConfig,
    accelerator: Accelerator,
    parameters: list[nn.Parameter],
) -> dict[str, Any]:
    """Trains until the last update, or until the held-out loss rises; the record of that loss."""
    updates, rate = config.target.target_train_steps, config.target.target_learning_rate
    schedule = config.changed("optimisation", lr_scheduler="cosine", lr_warmup_steps=0, max_train_steps=updates)
    optimizer, every = make_optimizer(parameters, rate, schedule), -(-updates // CHECKS)
    run.scalers.update(scalers_of({TARGET: optimizer}))
    batch = _batch_size(run, config)
    average = EMAModel(parameters, decay=config.optimisation.ema_decay if config.optimisation.use_ema else 0.0)

    def check(role: str) -> float:
        found = [(each, each.share * share, chosen) for each in images for share, chosen in each.held_out]
        parts = [part for part in found if len(part[2])]  # a size may have too few to hold one out
        losses = [
            share * _losses(run, each, role, chosen, chosen.tolist(), "target_held_out").mean()
            for each, share, chosen in parts
        ]
        return float(accelerator.reduce(torch.stack(losses).sum(), "mean")) / sum(share for _, share, _ in parts)

    teacher = {"guided": check(TEACHER), "unguided": check(TARGET)}  # the target is not different yet
    losses, best = {0: teacher["unguided"]}, (0, _copies(average.shadow_params))
    bar = tqdm(total=updates, desc="target", disable=not accelerator.is_main_process)
    for update in range(updates):
        first = (update * run.num_processes + run.process_index) * batch
        keys = range(first, first + batch)
        of_size = _of_update(images, update)
        chosen = of_size.chosen(of_size.draws.uniform("target_choice", keys).cpu())
        _losses(run, of_size, TARGET, chosen, keys, "target", trains=True)
        optimizer.set_update(update)
        optimizer.step()
        if optimizer.has_moved:
            update_average(average, parameters)
        bar.update()
        if (update + 1) % every and update + 1 < updates:
            continue
        with averaged(average, parameters):
            losses[update + 1] = check(TARGET)
        bar.set_postfix(held_out=f"{losses[update + 1]:.4g}", teacher=f"{teacher['unguided']:.4g}")
        if losses[update + 1] < losses[best[0]]:
            best = update + 1, _copies(average.shadow_params)
        elif update + 1 - best[0] >= PATIENCE * every:
            break
    bar.close()
    if overfitted(losses):
        warnings.warn(
            f"The target fits its images better than others of their prompts since update {best[0]}, whose weights are "
            "used; give it more (--num_target_images, or more of your own).",
            stacklevel=3,
        )
    else:
        best = max(losses), average.shadow_params
    for parameter, kept in zip(parameters, best[1], strict=True):
        parameter.data.copy_(kept)
    return {"images": sum(map(len, images)), "teacher": teacher, "target": losses, "update": best[0]}


def _of_update(images: Sequence[TargetImages], update: int) -> TargetImages:
    """The images of the size that an update has, on all processes."""
    generator = images[0].draws.generator("target_bucket", update)
    return images[int(torch.multinomial(torch.tensor([each.share for each in images]), 1, generator=generator))]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def overfitted(losses: Mapping[int, float]) -> bool:
    """Whether the loss on held-out images, by update, ends clearly above its lowest."""
    return losses[max(losses)] > (1 + OVERFITTED) * min(losses.values())


def _losses(
    run: Distillation,
    images: TargetImages,
    role: str,
    indices: Tensor,
    keys: Sequence[int],
    purpose: str,
    trains: bool = False,
) -> Tensor:
    """A role's denoising loss of each chosen image `[B]`; its gradients are accumulated if it `trains`.

    The times and noises of `purpose` are drawn under `keys`, one for each image.

    Raises:
        NonFiniteError: if a loss is not finite.
    """
    networks, schedule, draws = run.networks, run.networks.schedule, images.draws
    t = denoising_times(draws.uniform(f"{purpose}_time", keys), schedule)
    noise = draws.normal(f"{purpose}_noise", keys, images.latents.shape[1:])
    x0, conditioning = images.latents[indices].to(draws.device, torch.float32), images.conditioning(indices)
    x_t = schedule.add_noise(x0, noise, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    weight = denoising_weight(sigma)
    losses = []
    for start in range(0, len(indices), run.micro_batch_size):
        part = slice(start, start + run.micro_batch_size)
        with torch.set_grad_enabled(trains):
            prediction = networks.predict(role, x_t[part], t[part], conditioning[part])
        wanted = x0[part]
        if trains:
            wanted = _expected(images, x_t[part], alpha[part], sigma[part], indices[part], wanted)
        direction, loss = fake_score_direction(prediction, wanted, weight[part], len(indices))
        losses.append(loss)
        if trains:
            run.backward(role, prediction, direction, part, len(indices))
    found = torch.cat(losses)
    if not found.isfinite().all():
        raise NonFiniteError("The target's loss is not finite; lower --target_learning_rate.")
    return found


def _expected(images: TargetImages, x_t: Tensor, alpha: Tensor, sigma: Tensor, indices: Tensor, x0: Tensor) -> Tensor:
    """What x0 is on average, given x_t and its prompt `[B, ...]`; x0 itself where every prompt has one image."""
    candidates, present = images.alike(indices)
    if candidates.shape[1] == 1:
        return x0
    found = images.latents[candidates].to(x_t.device, torch.float32)
    return posterior_mean(x_t, alpha, sigma, found, present.to(x_t.device))
