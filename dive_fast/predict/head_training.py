"""Training of heads on features: logistic regression, ridge, and a query over tokens.

Features are standardised first, z = (f - mean) / scale, so that one list of penalties suits every
block and model.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from dive_fast.core.head import attend
from dive_fast.errors import DiveFastError

PENALTIES = (0.001, 0.01, 0.1, 1.0)  # C of the logistic regression
ALPHAS = tuple(10.0**k for k in range(8))  # of the ridge
ITERATIONS = 100  # of L-BFGS; what is left to gain then lies below the noise of a validation part
UNSEEN = -1e4  # logit of classes without a training image
STEPS, ROWS, RATE, DECAY = 400, 256, 0.01, 0.01  # of AdamW for the attention head


class Weights(NamedTuple):
    """What ``core.head.Head`` computes with, all float32; ``penalty`` as it was chosen."""

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    scale: torch.Tensor
    query: torch.Tensor | None
    penalty: float


def train_linear(
    features: torch.Tensor, labels: torch.Tensor, n_classes: int, penalty: float
) -> Weights:
    """Multinomial logistic regression with an L2 penalty, by scikit-learn.

    Classes without a training image are ranked last.

    Args:
        features: float32 [B, D].
        labels: int64 [B] of [0, n_classes).
        penalty: scikit-learn's C, the inverse of its strength.

    Raises:
        DiveFastError: images of one class only, or no scikit-learn.
    """
    from_sklearn = _sklearn()
    mean, scale = standardisation(features)
    if len(labels.unique()) < 2:
        raise DiveFastError("a linear head is learned from images of 2 classes or more, got one.")
    model = from_sklearn.LogisticRegression(C=penalty, max_iter=ITERATIONS, tol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the number of iterations
        # In float32: half the time.
        model.fit(((features - mean) / scale).numpy(), labels.numpy())
    found, offset = torch.tensor(model.coef_), torch.tensor(model.intercept_)
    if len(found) == 1:  # two classes: the logit of the second against the first
        found, offset = torch.cat([-found, found]) / 2, torch.cat([-offset, offset]) / 2
    weight = torch.zeros(n_classes, features.shape[1])
    bias = torch.full((n_classes,), UNSEEN)
    seen = torch.tensor(model.classes_)
    weight[seen], bias[seen] = found.float(), offset.float()
    return Weights(weight, bias, mean, scale, None, penalty)


def train_losses(features: torch.Tensor, losses: torch.Tensor) -> Weights:
    """Ridge regression of centred losses, by scikit-learn, its alpha that of ``ALPHAS`` with the
    lowest leave-one-out error.

    Args:
        features: float32 [B, D].
        losses: float32 [B, C]; their mean over the classes is taken off.

    Raises:
        DiveFastError: no scikit-learn.
    """
    from_sklearn = _sklearn()
    mean, scale = standardisation(features)
    z = ((features - mean) / scale).double().numpy()
    centred = centre(losses)
    # Losses of one model differ in the fourth digit; the penalty shall not depend on their unit.
    unit = max(centred.std().item(), torch.finfo(torch.float32).tiny)
    targets = (centred / unit).double().numpy()
    model = from_sklearn.RidgeCV(alphas=ALPHAS).fit(z, targets)
    weight = torch.tensor(model.coef_).float().reshape(losses.shape[1], -1) * unit
    bias = torch.tensor(model.intercept_).float().reshape(-1) * unit
    return Weights(weight, bias, mean, scale, None, float(model.alpha_))


def train_attention(
    tokens: torch.Tensor, labels: torch.Tensor, n_classes: int, seed: int
) -> Weights:
    """Attention pooling by one learned query and a linear head on it, by AdamW.

    After the attention heads of Mukhopadhyay et al. (2023), with one query instead of a block.

    Args:
        tokens: float32 [B, N, D].
        labels: int64 [B].
        seed: of the order of the images.
    """
    mean, scale = standardisation(tokens.flatten(0, 1))
    z = (tokens - mean) / scale
    # From zeros the head starts as the mean over the tokens, without a preference.
    query = torch.zeros(z.shape[-1], requires_grad=True)
    weight = torch.zeros(n_classes, z.shape[-1], requires_grad=True)
    bias = torch.zeros(n_classes, requires_grad=True)
    learned = [query, weight, bias]
    optimizer = torch.optim.AdamW(learned, lr=RATE, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(STEPS):
            rows = torch.randint(len(z), (min(ROWS, len(z)),), generator=generator)
            logits = attend(z[rows], query) @ weight.T + bias
            loss = torch.nn.functional.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    query, weight, bias = (tensor.detach() for tensor in learned)
    return Weights(weight, bias, mean, scale, query, DECAY)


def as_losses(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Labels [B] as losses float32 [B, C] that a ridge can learn: -1 of the label, else 0."""
    return -torch.nn.functional.one_hot(labels, n_classes).float()


def standardisation(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of features [B, D], float32 [D]; 1 where they do not vary."""
    mean, scale = features.mean(dim=0), features.std(dim=0, correction=0)
    # What varies by rounding alone would be blown up.
    constant = scale <= 1e-6 * mean.abs() + torch.finfo(torch.float32).tiny
    return mean, scale.masked_fill(constant, 1.0)


def centre(losses: torch.Tensor) -> torch.Tensor:
    """Losses [B, C] less their mean over the classes."""
    return losses - losses.mean(dim=1, keepdim=True)


def _sklearn():
    try:
        from sklearn import linear_model
    except ImportError as error:
        raise DiveFastError(
            "heads are trained by scikit-learn, which is not installed: "
            "pip install 'dive_fast[probe]'."
        ) from error
    return linear_model
