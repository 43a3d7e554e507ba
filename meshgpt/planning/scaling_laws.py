"""Scaling laws: what a budget buys by three published laws, and the same law fitted to one's own runs.

Loss is in nats a token, and every law's is of its own text and tokenizer: WebText2 with GPT-2's 50,257 tokens (Kaplan),
MassiveText with 32,000 (Hoffmann; Besiroglu reads the same experiments). Losses of different laws are therefore not
comparable to better than a tenth or two; sizes and tokens are. N parameters, D tokens, C = 6 N D operations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

PF_DAY = 8.64e19  # floating-point operations
Counting: TypeAlias = Literal["all", "non-embedding"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a law would do. parameters: as `counting` of the law says. tokens: to train on. loss: predicted, nats."""

    law: str
    counting: Counting
    parameters: float
    tokens: float
    loss: float

    @property
    def flops(self) -> float:
        """6 N D, with the law's own N."""
        return 6 * self.parameters * self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)


class Kaplan:
    """Kaplan et al. 2020, "Scaling Laws for Neural Language Models": the compute-efficient frontier.

    With Cmin in PF-days (appendix A, tables 5 and 6): L = (3.1e8 / Cmin)^0.050; N = 1.3e9 Cmin^0.73 parameters outside
    the embeddings; D = 2.0e10 Cmin^0.27 tokens. Cmin is what training far below the critical batch size would take; at
    that size, which D assumes, it takes about twice as much: 6 N D = 1.8 Cmin.
    """

    name = "Kaplan et al. 2020"
    counting: Counting = "non-embedding"

    def of_cmin(self, pf_days: float) -> Choice:
        """The choice at Cmin, in PF-days."""
        return Choice(
            law=self.name,
            counting=self.counting,
            parameters=1.3e9 * pf_days**0.73,
            tokens=2.0e10 * pf_days**0.27,
            loss=(3.1e8 / pf_days) ** 0.050,
        )

    def of_flops(self, flops: float) -> Choice:
        """The choice whose 6 N D is `flops`."""
        return self.of_cmin(flops / (6 * 1.3e9 * 2.0e10))

    def of_parameters(self, parameters: float) -> Choice:
        """The choice of this size."""
        return self.of_cmin((parameters / 1.3e9) ** (1 / 0.73))

    def of_tokens(self, tokens: float) -> Choice:
        """The choice that takes so many tokens."""
        return self.of_cmin((tokens / 2.0e10) ** (1 / 0.27))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parametric:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, equation 2), N being all parameters.

    For 6 N D = C the least loss is at N = G (C/6)^a, D = (C/6)^b / G with a = beta / (alpha + beta), b = 1 - a and
    G = (alpha A / (beta B))^(1 / (alpha + beta)) (equation 4).
    """

    name: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    counting: Counting = "all"

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def of_flops(self, flops: float) -> Choice:
        """The choice whose 6 N D is `flops`."""
        share = self.beta / (self.alpha + self.beta)
        parameters = self._balance * (flops / 6) ** share
        return self._choice(parameters, flops / 6 / parameters)

    def of_parameters(self, parameters: float) -> Choice:
        """The choice of this size."""
        share = self.beta / (self.alpha + self.beta)
        return self._choice(parameters, (parameters / self._balance) ** (1 / share) / parameters)

    def of_tokens(self, tokens: float) -> Choice:
        """The choice that takes so many tokens."""
        share = self.alpha / (self.alpha + self.beta)
        return self._choice((tokens * self._balance) ** (1 / share) / tokens, tokens)

    @property
    def _balance(self) -> float:
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def _choice(self, parameters: float, tokens: float) -> Choice:
        loss = self.loss(parameters, tokens)
        return Choice(law=self.name, counting=self.counting, parameters=parameters, tokens=tokens, loss=loss)


KAPLAN = Kaplan()
# Approach 3. The paper rounds alpha and beta to 0.34 and 0.28, which moves its optimum; these are the digits of its TeX
# source, as Besiroglu et al. 2024 report them (section 2).
HOFFMANN = Parametric(name="Hoffmann et al. 2022, approach 3", E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849)
BESIROGLU = Parametric(name="Besiroglu et al. 2024", E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
Law: TypeAlias = Kaplan | Parametric
LAWS: tuple[Law, ...] = (KAPLAN, HOFFMANN, BESIROGLU)


def critical_batch(loss: float) -> float:
    """Tokens in a batch beyond which more of them save few steps: 2e8 / L^(1 / 0.21) (Kaplan et al. 2020, eq. 1.4)."""
    return 2e8 / loss ** (1 / 0.21)


def learning_rate(parameters: float) -> float | None:
    """Adam's peak rate for N non-embedding parameters: 0.003239 - 0.0001395 ln N (Kaplan et al. 2020, eq. D.1).

    A fit to models up to some billions; None where it is no longer positive (their footnote: above 1e10).
    """
    rate = 0.003239 - 0.0001395 * math.log(parameters)
    return rate if rate > 0 and parameters < 1e10 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Sizes of a GPT-2 or GPT-J model with heads of 64. vocab: ids; positions: learned ones (0: rotary, GPT-J)."""

    n_layers: int
    d_model: int
    vocab: int
    positions: int

    @property
    def n_heads(self) -> int:
        return self.d_model // 64

    @property
    def blocks(self) -> int:
        """12 d^2 a layer, and its biases and norms: what Kaplan calls N, with the few parameters that he leaves out."""
        biases = 13 if self.positions else 7
        return self.n_layers * (12 * self.d_model**2 + biases * self.d_model)

    @property
    def parameters(self) -> int:
        """All of them: GPT-2 ties its head, GPT-J has one of its own, with a bias."""
        tables = self.vocab + self.positions if self.positions else 2 * self.vocab
        return self.blocks + tables * self.d_model + 2 * self.d_model + (0 if self.positions else self.vocab)

    def flops_per_token(self, seq_len: int) -> int:
        """As `flops.flops_per_token` counts: 6 a weight of a matmul (the head's too), and attention."""
        matmul = 12 * self.n_layers * self.d_model**2 + self.vocab * self.d_model
        return 6 * matmul + 12 * self.n_layers * self.d_model * seq_len


_ASPECT = 80.0  # width over depth: GPT-2's are 64 to 32, GPT-3's 64 to 128, and Kaplan finds little difference between


def shape_for(parameters: float, counting: Counting, vocab: int, positions: int) -> ModelShape:
    """The model nearest to `parameters` among those of widths that are multiples of 64 and a usual depth."""
    largest = max(2, math.ceil((parameters / 12 * 300) ** (1 / 3) / 64) + 1)
    shapes = [
        ModelShape(n_layers=layers, d_model=64 * width, vocab=vocab, positions=positions)
        for width in range(1, largest + 1)
        for layers in {max(1, round(64 * width / (_ASPECT * 2 ** (tilt / 8)))) for tilt in range(-8, 9)}
    ]

    def distance(shape: ModelShape) -> float:
        count = shape.parameters if counting == "all" else shape.blocks
        aspect = abs(math.log(shape.d_model / shape.n_layers / _ASPECT))
        return abs(math.log(count / parameters)) + 0.05 * aspect

    return min(shapes, key=distance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Points:
    """Measured losses. parameters, tokens, loss: (n,) float64. run: (n,) int, which run a point is of."""

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    run: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law, and as many more of resampled residuals as were asked for."""

    law: Parametric
    resampled: Sequence[Parametric]
    residual: float
    """Root mean square of log(measured / fitted)."""

    def interval(self, parameters: float, tokens: float, level: float = 0.95) -> tuple[float, float]:
        """Between which losses the resampled laws lie at (N, D), but for (1 - level) / 2 on either side."""
        losses = [law.loss(parameters, tokens) for law in self.resampled]
        low, high = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    def interval_of(self, name: Literal["E", "A", "B", "alpha", "beta"], level: float = 0.95) -> tuple[float, float]:
        """The same for one of the law's constants."""
        values = [getattr(law, name) for law in self.resampled]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


_HUBER = 1e-3
_LEAST_POINTS = 6
_EXPONENTS = np.geomspace(0.05, 1.6, 12)  # of the grid that a fit starts from
_LOWEST, _HIGHEST = np.array([-10.0, -10, -7, 0.02, 0.02]), np.array([40.0, 40, 3, 2, 2])  # of what `fit` varies


def fit(points: Points, resamples: int = 200, seed: int = 0) -> Fit:
    """Fits E, A, B, alpha and beta to `points`, and again to resampled ones.

    Least Huber loss (delta 1e-3) of log(measured) - log(L(N, D)) (Hoffmann et al. 2022, equation 3), from the best of a
    grid of exponents, for each of which the other constants are least squares. Resampling keeps N and D and gives each
    run the residuals of a run drawn with replacement, because points of one run err together; residuals are enlarged by
    sqrt(n / (n - 5)) for what the fit took.

    Raises:
      ValueError: fewer than 6 points, fewer than 3 sizes, or a value that is not positive and finite.
    """
    table = np.stack([points.parameters, points.tokens, points.loss])
    if not (np.isfinite(table) & (table > 0)).all():
        raise ValueError("parameters, tokens and losses must be positive and finite")
    if table.shape[1] < _LEAST_POINTS or len(np.unique(points.parameters)) < 3:
        raise ValueError(f"five constants take at least {_LEAST_POINTS} points of at least 3 sizes")
    logs = np.log(table)
    best = min((_minimise(logs, start) for start in _starts(logs)), key=lambda found: found[0])[1]
    fitted = _log_loss(best, logs)
    residuals = logs[2] - fitted
    enlarged = residuals * math.sqrt(len(residuals) / (len(residuals) - len(best)))
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(resamples):
        again = np.stack([logs[0], logs[1], fitted + _redealt(enlarged, points.run, rng)])
        resampled.append(_law(_minimise(again, best)[1]))
    return Fit(law=_law(best), resampled=resampled, residual=float(np.sqrt(np.mean(residuals**2))))


def _starts(logs: np.ndarray) -> list[np.ndarray]:
    """The best (ln A, ln B, ln E, alpha, beta) of a grid, E, A and B being least squares of the relative error."""
    from scipy.optimize import nnls

    n, d, loss = np.exp(logs)
    scored = []
    for alpha in _EXPONENTS:
        for beta in _EXPONENTS:
            columns = np.stack([(n / n.min()) ** -alpha, (d / d.min()) ** -beta, np.ones_like(n)], axis=1)
            weights, error = nnls(columns / loss[:, None], np.ones_like(loss))
            a, b, e = np.log(np.maximum(weights, 1e-3))
            theta = np.array([a + alpha * logs[0].min(), b + beta * logs[1].min(), e, alpha, beta])
            scored.append((error, theta))
    scored.sort(key=lambda pair: pair[0])
    return [theta for _, theta in scored[:4]]


def _minimise(logs: np.ndarray, start: np.ndarray) -> tuple[float, np.ndarray]:
    from scipy.optimize import least_squares

    found = least_squares(
        lambda theta: _log_loss(theta, logs) - logs[2],
        np.clip(start, _LOWEST + 1e-6, _HIGHEST - 1e-6),
        jac=lambda theta: _jacobian(theta, logs),  # pyright: ignore[reportArgumentType]
        bounds=(_LOWEST, _HIGHEST),
        loss="huber",
        f_scale=_HUBER,
        x_scale=np.array([1.0, 1.0, 0.1, 0.1, 0.1]),
        max_nfev=300,
    )
    return float(found.cost), found.x


def _terms(theta: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """The logs of A / N^alpha, B / D^beta and E, (3, n)."""
    a, b, e, alpha, beta = theta
    return np.stack([a - alpha * logs[0], b - beta * logs[1], np.full_like(logs[0], e)])


def _log_loss(theta: np.ndarray, logs: np.ndarray) -> np.ndarray:
    return np.logaddexp.reduce(_terms(theta, logs), axis=0)


def _jacobian(theta: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """(n, 5): by how much log L changes with each constant; the share of each term in L."""
    terms = _terms(theta, logs)
    shares = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
    return np.stack([*shares, -shares[0] * logs[0], -shares[1] * logs[1]], axis=1)


def _law(theta: np.ndarray) -> Parametric:
    a, b, e, alpha, beta = (float(value) for value in theta)
    return Parametric(name="fitted", E=math.exp(e), A=math.exp(a), B=math.exp(b), alpha=alpha, beta=beta)


def _redealt(residuals: np.ndarray, run: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """To each run's points the residuals of another, in their order (stretched where it has fewer or more)."""
    runs = np.unique(run)
    dealt = np.empty_like(residuals)
    for own in runs:
        given = residuals[run == rng.choice(runs)]
        places = np.flatnonzero(run == own)
        dealt[places] = given[np.linspace(0, len(given) - 1, len(places)).round().astype(int)]
    return dealt
