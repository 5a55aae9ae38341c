"""R_dm distillation on one page, a four-step student of a diffusion teacher: `python docs/nano_rdm.py`.

A *student* learns to draw in four jumps what the *teacher* draws in many small steps. It sees no data; it gets a
reward, R_dm = teacher's x0 - fake score's x0. Both denoise the student's sample under fresh noise, so R_dm points from
what the student draws to what the teacher would draw. The *fake score*, a denoiser of the student's own samples, learns
beside the student and lags behind it. A *group* of samples of one prompt shows how far it lags, and GNDM corrects for
that; in groups of one it is plain DMD. GNDMR adds an external reward. All formulas are our reading of arXiv 2603.28460,
whose code is not public. The package works on pictures; here are points of the plane, and the teacher is exact.
"""

import copy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

STEPS = torch.tensor([1.0, 0.75, 0.5, 0.25])  # the times at which the student jumps; 1 is pure noise, 0 is clean
BATCH, FAKE_UPDATES, RATE = 256, 1, 1e-3  # samples per update; fake-score updates per student update; both Adams' rate
LAMBDA = 1.0  # how much of the fake score's bias is removed
PROMPTS, MODES, WIDTH = 8, 3, 0.3  # the data: each prompt has so many Gaussians of that width, on a circle
ANGLES = 2 * torch.pi * (torch.arange(PROMPTS)[:, None] / PROMPTS + torch.arange(MODES)) / MODES
MEANS = 1.2 * torch.stack([ANGLES.cos(), ANGLES.sin()], 2)


def scales(t):
    """How much signal and how much noise is in x_t = alpha x0 + sigma noise."""
    return (t[:, None] * torch.pi / 2).cos(), (t[:, None] * torch.pi / 2).sin()


def noised(x0, t):
    return scales(t)[0] * x0 + scales(t)[1] * torch.randn_like(x0)


def teacher(x_t, t, prompt):
    """The perfect denoiser: the mean of the clean points, given x_t."""
    alpha, sigma = (scale[:, None] for scale in scales(t))
    offset, variance = x_t[:, None] - alpha * MEANS[prompt], alpha**2 * WIDTH**2 + sigma**2
    share = (-offset.square().sum(2, keepdim=True) / (2 * variance)).softmax(1)  # the probability of each Gaussian
    return (share * (MEANS[prompt] + alpha * WIDTH**2 / variance * offset)).sum(1)


def teacher_samples(prompt):
    return MEANS[prompt, torch.randint(MODES, prompt.shape)] + WIDTH * torch.randn(len(prompt), 2)


class Denoiser(nn.Module):
    """A small network, called as the teacher is; student and fake score are two of these."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4 + PROMPTS, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x_t, t, prompt):
        alpha, sigma = scales(t)
        features = torch.cat([x_t, alpha, sigma, nn.functional.one_hot(prompt, PROMPTS)], 1)
        return alpha * x_t - sigma * self.body(features)  # v-prediction: well scaled at every noise


def denoising_update(denoiser, optimizer, x0, prompt):
    """One step of ordinary diffusion training on `x0`, for the pretraining and for the fake score."""
    t = torch.rand(len(x0)).clamp(min=0.02)
    ((denoiser(noised(x0, t), t, prompt) - x0) / scales(t)[1]).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def rollout(student, prompt):
    """Few-step sampling: jump to x0, add the noise of the next time, jump again. Returns all states and the end."""
    states = [torch.randn(len(prompt), 2)]
    for i, t in enumerate(STEPS):
        x0 = student(states[i], t.expand(len(prompt)), prompt)
        states.append(noised(x0, STEPS[i + 1].expand(len(prompt))) if i + 1 < len(STEPS) else x0)
    return torch.stack(states)


def fake_score_bias(residual, sigma, group_size):
    """The fake score's error at each sample, measured on the *others* of its group; 0 in groups of one.

    A perfect fake score is right on average, so over a group its residuals (fake x0 - x̂) cancel. What does not cancel
    is its lag. A sample's own residual is left out, because it would pull the sample to the middle of its group."""
    share = sigma**2  # of a move of the student, the part that the fake score misses: more noise hides more
    groups = (values.unflatten(0, (-1, group_size)) for values in (residual, share))
    others, missed = (values.sum(1, keepdim=True) - values for values in groups)
    return share * (others / missed.clamp(min=1e-8)).flatten(0, 1)


def distil(start, updates, group_size, reward=None, rho=0.0):
    """DMD in groups of one, GNDM in larger ones, GNDMR with a `reward` that counts `rho` times R_dm."""
    student, fake_score = copy.deepcopy(start), copy.deepcopy(start)  # both begin as the teacher
    optimizer, fake_optimizer = (torch.optim.Adam(network.parameters(), RATE) for network in (student, fake_score))
    average, rms = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.99)), None
    for _ in range(updates):
        # A group is one prompt at one step, each member with its own noise, at a state that the student itself reached.
        choice = torch.randint(PROMPTS * len(STEPS), (BATCH // group_size,)).repeat_interleave(group_size)
        prompt, step = choice % PROMPTS, choice // PROMPTS
        x0 = student(rollout(student, prompt)[step, torch.arange(BATCH)], STEPS[step], prompt)
        sample = x0.detach()  # every term below is a direction for the sample, and needs no graph
        # R_dm: add fresh noise to the sample, and let both denoise it.
        tau = 0.02 + 0.96 * torch.rand(BATCH)
        x_tau, sigma = noised(sample, tau), scales(tau)[1]
        teacher_x0, fake_x0 = teacher(x_tau, tau, prompt), fake_score(x_tau, tau, prompt).detach()
        r_dm = teacher_x0 - fake_x0
        # The group corrects R_dm and sets the step's length: the farther from the teacher, the shorter.
        r_dm = r_dm + LAMBDA * fake_score_bias(fake_x0 - sample, sigma, group_size)
        distance = (sample - teacher_x0).abs().unflatten(0, (-1, group_size)).mean((1, 2))
        direction = r_dm / distance.repeat_interleave(group_size)[:, None]
        # An external reward is one more direction, rescaled to the size of the first.
        if reward is not None:
            gradient = torch.func.grad(lambda points: reward(points).sum())(sample)
            sizes = torch.stack([direction, gradient]).square().mean((1, 2)).sqrt()
            rms = sizes if rms is None else 0.95 * rms + 0.05 * sizes
            direction = direction + rho * rms[0] * gradient / rms[1]
        # One backward carries the direction into the student. Then the fake score learns the new samples.
        x0.backward(-direction / direction.numel())
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(student)
        for _ in range(FAKE_UPDATES):
            denoising_update(fake_score, fake_optimizer, sample, prompt)
    return average.module  # the student itself oscillates; its moving average is better


def measure(student, count=4000):
    """Distance to the teacher (sliced Wasserstein: points sorted along lines, compared in pairs) and mean height."""
    prompt = torch.arange(PROMPTS).repeat_interleave(count)
    points, lines = rollout(student, prompt)[-1], nn.functional.normalize(torch.randn(2, 32), dim=0)
    ours, theirs = ((p @ lines).view(PROMPTS, count, -1).sort(1).values for p in (points, teacher_samples(prompt)))
    return (ours - theirs).square().mean((1, 2)).sqrt().mean().item(), points[:, 1].mean().item()


def main(updates=1200, pretraining=1500, seed=0):
    """Prints and returns each method's distance to the teacher and mean height, all at equally many network calls."""
    torch.manual_seed(seed)
    start = Denoiser()
    optimizer = torch.optim.Adam(start.parameters(), 2e-3)
    for _ in range(pretraining):  # a real student begins with its teacher's weights; ours learns from its samples
        prompt = torch.randint(PROMPTS, (BATCH,))
        denoising_update(start, optimizer, teacher_samples(prompt), prompt)
    methods = {"undistilled": (0, 1), "DMD": (updates, 1), "GNDM": (updates, 8)}
    methods["GNDMR"] = (updates, 8, lambda points: points[:, 1], 0.2)  # rewarded for height
    results = {name: measure(distil(start, *options)) for name, options in methods.items()}
    for name, (distance, height) in results.items():
        print(f"{name:12} distance to the teacher {distance:.3f}   mean height {height:+.3f}")
    return results


if __name__ == "__main__":
    main()
