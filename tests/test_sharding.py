"""Networks in shards over two processes compute, average and wait as they are told; so does the whole launch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parts import make_run, relative_error, run_arguments, train_run
from parts_processes import in_two_processes
from safetensors.torch import load_file, save_file
from torch.distributed.distributed_c10d import _get_default_group

from rdm_diffusers.families import Conditioning, load_denoiser
from rdm_diffusers.networks import FAKE_SCORE, ROLES, STUDENT, TEACHER
from rdm_diffusers.sharding import gather
from rdm_diffusers.training import checkpoints
from rdm_diffusers.training.batches import collect
from rdm_diffusers.training.checkpoint_files import damage, files_of, read_part
from rdm_diffusers.training.trainer import Trainer

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture
def argv(teacher_folder: Path, prompts_file: Path, tmp_path: Path):
    """Makes a command line of this test."""
    return lambda **changes: run_arguments(teacher_folder, prompts_file, tmp_path / "student", **changes)


def inputs(it: Trainer) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    """Two samples, the same on every process."""
    x_t = torch.randn(2, *it.distillation.latent_shape, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([300, 800]), it.distillation.prompts.once([0, 1])


def test_shards_compute_in_bf16_are_trained_in_float32_and_are_saved_whole_in_pieces_by_all_processes(
    argv, teacher_folder: Path, tmp_path: Path
) -> None:
    options = dict(mixed_precision="bf16", rank=None, train_batch_size=4, max_train_steps=1, checkpointing_steps=1)
    options |= dict(fake_updates_per_step=1)
    wrote, save = tmp_path / "wrote", checkpoints.save_file

    def noted(tensors: dict[str, torch.Tensor], path: Path) -> None:
        with wrote.open("a") as file:
            file.write(f"{os.environ['RANK']} {path.name}\n")
        save(tensors, path)

    def work() -> None:
        checkpoints.PIECE, checkpoints.save_file = 400_000, noted
        it = make_run(argv(**options), "full")
        x_t, t, conditioning = inputs(it)
        bf16 = load_denoiser(str(teacher_folder), torch.bfloat16)
        before = [gather(p.detach()).clone() for p in it.networks.parameters(STUDENT)]
        with torch.no_grad():
            expected = it.teacher.family.denoise(bf16, x_t, t, conditioning).float()
            for role in ROLES:
                assert torch.equal(it.networks._output(role, x_t, t, conditioning), expected)
        assert train_run(it) == 0
        after = [gather(p.detach()) for p in it.networks.parameters(STUDENT)]
        assert all(p.dtype == torch.float32 and not torch.equal(p, q) for p, q in zip(after, before, strict=True))
        leads = it.accelerator.is_main_process
        assert len(it.networks.student_weights(keep=leads)) == len(before) * leads
        if leads:
            save_file({str(i): tensor for i, tensor in enumerate(after)}, tmp_path / "expected.safetensors")

    in_two_processes(work, **SHARDED)
    checkpoint, expected = tmp_path / "student" / "checkpoint-1", load_file(tmp_path / "expected.safetensors")
    lines = wrote.read_text().split()
    assert set(lines[::2]) == {"0", "1"} and sorted(lines[1::2]) == sorted(p.name for p in checkpoint.glob("*.safe*"))
    assert damage(checkpoint) is None and len(files_of(checkpoint, "student")) > 1
    saved = read_part(checkpoint, "student")
    assert all(torch.equal(saved[f"parameter/{name}"], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("student", ["lora", "full"])
def test_sharded_gradients_are_averaged_once_an_update_or_after_every_micro_batch(argv, student: str) -> None:
    def work() -> None:
        options = dict(train_batch_size=4, ddp_timeout=77, rank=2 if student == "lora" else None)
        it = make_run(argv(**options), student)
        x_t, t, conditioning = inputs(it)
        found = []
        for run in (it.distillation, replace(it.distillation, sync_each_batch=True)):
            for part in (slice(0, 2), slice(2, 4)):
                x0 = run.networks.predict(FAKE_SCORE, x_t, t, conditioning)
                run.backward(FAKE_SCORE, x0, torch.ones_like(x0) * (1 + it.accelerator.process_index), part, 4)
                gradients = [p.grad for p in run.networks.parameters(FAKE_SCORE)]
                assert all((grad is None) == (part.stop < 4 and not run.sync_each_batch) for grad in gradients)
            found.append([gather(gradient) for gradient in gradients])
            for parameter in run.networks.parameters(FAKE_SCORE):
                parameter.grad = None
        assert relative_error(*found) < 1e-5
        groups = _get_default_group(), next(iter(it.networks.parameters(STUDENT))).device_mesh.get_group()
        waits = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
        assert waits == [77, 77]

    in_two_processes(work, **SHARDED)


@pytest.mark.parametrize("student", ["lora", "full"])
def test_shards_pull_back_as_whole_networks_do_and_are_trained_on(argv, student: str) -> None:
    options = dict(
        algorithm="sid", train_batch_size=4, rank=2 if student == "lora" else None, gradient_checkpointing=True
    )

    def pulled(it: Trainer) -> list[torch.Tensor]:
        x_t, t, conditioning = inputs(it)
        cotangent = torch.ones_like(x_t) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
        return [it.networks.pull_back(role, x_t, t, conditioning, cotangent) for role in (TEACHER, FAKE_SCORE)]

    whole = pulled(make_run(argv(**options), student))

    def work() -> None:
        it = make_run(argv(**options), student)
        for found, expected in zip(pulled(it), whole, strict=True):
            assert relative_error(found, expected) < 1e-5
        before = [gather(parameter.detach()).clone() for parameter in it.networks.parameters(STUDENT)]
        assert train_run(it) == 0
        after = [gather(parameter.detach()) for parameter in it.networks.parameters(STUDENT)]
        assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))

    in_two_processes(work, **SHARDED)


def test_a_rollout_goes_as_deep_as_its_own_process_needs_and_all_as_deep_where_weights_are_shared(argv) -> None:
    it = make_run(argv(num_student_steps=8, train_batch_size=4))
    depths = []
    for number in range(2):
        own = [replace(it.distillation, num_processes=2, process_index=index) for index in range(2)]
        shared = [replace(run, is_sharded=True) for run in own]
        depths.append([run.depth(number) for run in own])
        assert [run.depth(number) for run in shared] == [max(depths[-1])] * 2
        for run, deeper in zip(own, shared, strict=True):
            assert torch.equal(collect(run, number).samples.x0, collect(deeper, number).samples.x0)
    assert any(first != second for first, second in depths)
