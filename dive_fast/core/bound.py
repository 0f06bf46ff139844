"""The variational bound of a discrete diffusion model, and the probes that measure it.

With SNR_t = a_t^2 / s_t^2, s = t - 1 and D numbers in x0 (DDPM, arXiv 2006.11239, in the letters of
VDM, arXiv 2107.00630):

    -log p(x0) <=  KL(q(x_T | x0) || p(x_T))                              prior
                 + sum_{t >= 1} E KL(q(x_s | x_t, x0) || p(x_s | x_t))    diffusion
                 + E -log p(x0 | x_0)                                     reconstruction

    p(x_T)        = N(0, (a_T^2 + s_T^2) I)
    p(x_s | x_t)  = N(mean of q(x_s | x_t, x0_hat), R_t v_t I),   v_t the variance of q,
                    R_t = (1 + SNR_s) / (1 + SNR_t)
    p(x0 | x_0)   = N(x_0 / a_0, I / SNR_0),  or its integral over the pixel's interval

    KL_t = D/2 (log R_t + 1 / R_t - 1) + (SNR_s - SNR_t) / (2 R_t) || x0 - x0_hat(x_t, t, y) ||^2

R_t = 1 is VDM's bound. R_t as above is exact for x0 ~ N(0, I), and beta_t in DDPM; as T grows the
two meet. At T = 1000 the first steps are large, and R_t = 1 loses 0.3 to 1.4 nats per dimension
of x0 ~ N(0, 0.25 I).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dive_fast.core.numbers import whole_seed
from dive_fast.core.probes import ProbeList, check_count
from dive_fast.core.schedule import Schedule
from dive_fast.errors import DiveFastError, ModelError, shown

STRATUM = 4  # probes: two draws of t, each with eps and -eps
FEWEST = 2 * STRATUM
EVEN = 0.1  # share of the probes that are spread evenly over the timesteps


def signal_to_noise(schedule: Schedule) -> Tensor:
    """SNR_t, float64 [T].

    Raises:
        ModelError: it does not fall from one timestep to the next, or the first is not finite.
    """
    snr = (schedule.a.double() / schedule.s.double()).square()
    if len(snr) < 2 or not (snr.isfinite().all() and (snr[1:] < snr[:-1]).all()):
        raise ModelError(
            "a likelihood needs a schedule of 2 timesteps or more, whose a / s is finite and falls "
            "from each to the next."
        )
    return snr


def step_terms(schedule: Schedule) -> tuple[Tensor, Tensor]:
    """KL_t / D = constant_t + weight_t l_t: two of float64 [T - 1], of t = 1 ... T - 1.

    l_t is the loss that the engine measures, the mean squared error of ``schedule.target``.

    Raises:
        ModelError: as ``signal_to_noise``; or x_t without signal, where eps says nothing of x0.
    """
    snr = signal_to_noise(schedule)
    ratio = (1 + snr[:-1]) / (1 + snr[1:])
    weight = (snr[:-1] - snr[1:]) / (2 * ratio)
    return (ratio.log() + 1 / ratio - 1) / 2, weight * _x0_per_target(schedule)[1:].square()


def _x0_per_target(schedule: Schedule) -> Tensor:
    """|x0 - x0_hat| / |target - prediction| at the same x_t, float64 [T]."""
    a, s = schedule.a.double(), schedule.s.double()
    if schedule.target == "epsilon" and not a.all():
        raise ModelError(
            "a schedule that ends without signal (zero terminal SNR) needs another target than "
            "epsilon for a likelihood."
        )
    factors = {
        "epsilon": lambda: s / a,  # eps = (x_t - a x0) / s
        "v_prediction": lambda: s / (a**2 + s**2),  # a x_t - s v = (a^2 + s^2) x0
        "sample": lambda: torch.ones_like(a),
        "flow": lambda: s / (a + s),  # x_t - s (eps - x0) = (a + s) x0
    }
    if schedule.target not in factors:
        raise ModelError(f"no likelihood is known for the target {shown(schedule.target)}.")
    return factors[schedule.target]()


def prior_term(schedule: Schedule, x0: Tensor) -> Tensor:
    """KL(N(a_T x0, s_T^2 I) || N(0, (a_T^2 + s_T^2) I)) of x0 [B, C, h, w]: float64 [B], nats."""
    snr = signal_to_noise(schedule)[-1]
    square = x0.double().flatten(1).square().mean(dim=1)
    per_dim = (torch.log1p(snr) + (1 + snr * square) / (1 + snr) - 1) / 2
    return per_dim * x0[0].numel()


def density_reconstruction(schedule: Schedule) -> float:
    """E -log N(x0; x_0 / a_0, 1 / SNR_0) for one dimension, nats: the same for every x0."""
    return (1 + math.log(2 * math.pi) - float(signal_to_noise(schedule)[0].log())) / 2


def pixel_reconstruction(schedule: Schedule, width: float) -> tuple[float, float]:
    """E -log P(pixel | x_0) of a pixel within the range and of one at either end, nats.

    P is the Gaussian's integral over the interval around the pixel, which at the ends of the range
    goes on to infinity (arXiv 2006.11239, equation 13).

    Args:
        width: of the interval, in units of x0.
    """
    half = width / 2 * float(signal_to_noise(schedule)[0].sqrt())
    eps = torch.linspace(0, 12, 24_001, dtype=torch.float64)
    # The integrand of the first is even in eps; the second needs both signs.
    density = torch.exp(-(eps**2) / 2) / math.sqrt(2 * math.pi)
    upper, lower = torch.special.log_ndtr(half - eps), torch.special.log_ndtr(-half - eps)
    within = upper + torch.log(-torch.expm1(lower - upper))
    ends = upper + torch.special.log_ndtr(half + eps)
    return (
        -2 * float(torch.trapezoid(density * within, eps)),
        -float(torch.trapezoid(density * ends, eps)),
    )


def bound_probes(
    schedule: Schedule, k: object, shape: tuple[int, ...], seed: int = 0
) -> tuple[ProbeList, Tensor]:
    """K probes for the diffusion part, and what the mean loss of each pair of them counts.

    The K / 4 strata are equal parts of a density over the timesteps; in each t is drawn twice, and
    each t has eps and -eps. The mean over the K / 2 pairs of (factor times the pair's mean loss) is
    an unbiased estimate of sum_t weight_t l_t.

    Returns:
        The list, whose unit is a pair, and the factors, float64 [K / 2].

    Raises:
        DiveFastError: k is no multiple of 4 from 8 on.
        ModelError: as ``step_terms``.
    """
    k = check_count(k)
    if k % STRATUM or k < FEWEST:
        raise DiveFastError(
            f"expected a number of probes that 4 divides, at least {FEWEST}, got {k}."
        )
    weight = step_terms(schedule)[1]
    q = _density(schedule)
    generator = torch.Generator().manual_seed(whole_seed(seed))
    pairs, strata = k // 2, k // STRATUM
    jitter = torch.rand(pairs, generator=generator, dtype=torch.float64)
    u = (torch.arange(pairs) // 2 + jitter) / strata
    # Rounding can leave the last edge below 1.
    step = torch.searchsorted(q.cumsum(0), u, right=True).clamp(max=len(q) - 1)
    noise = torch.randn(pairs, *shape, generator=generator)
    noise = torch.stack([noise, -noise], dim=1).flatten(0, 1)
    return ProbeList(1 + step.repeat_interleave(2), noise, unit=2), weight[step] / q[step]


def _density(schedule: Schedule) -> Tensor:
    """q(t), float64 [T - 1]: proportional to KL_t's second term where x0 ~ N(0, I), and even.

    For such x0 the mean squared error is 1 / (1 + SNR_t). A smaller variance takes more probes at
    little noise, which all conditions have in common: little is won for log p(x | c), and more is
    lost for log p(x | c) - log p(x).
    """
    snr = signal_to_noise(schedule)
    guess = (snr[:-1] - snr[1:]) / (1 + snr[:-1])
    return (1 - EVEN) * guess / guess.sum() + EVEN / len(guess)


def standard_error(draws: Tensor) -> Tensor:
    """Of the mean over U draws [..., U], two in each stratum: sqrt(sum_h d_h^2) / U.

    d_h is the difference of the two draws in stratum h, both independent: d_h^2 / 4 estimates the
    variance of their mean without bias.
    """
    difference = draws[..., 0::2] - draws[..., 1::2]
    return difference.square().sum(dim=-1).sqrt() / draws.shape[-1]
