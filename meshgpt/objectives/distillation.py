"""Distillation as an objective: a student learns from a frozen teacher's distributions besides the text itself.

    loss = alpha_ce T^2 KL(softmax(t / T) || softmax(s / T)) + alpha_clm (-log softmax(s)[target]) + alpha_cos (1 - cos)

per token, s and t the logits of student and teacher, cos between their last hidden states (after the final norm, as
transformers' `hidden_states[-1]`), T the temperature. So in Sanh et al. 2019, "DistilBERT", section 2, and in the code
that made DistilGPT2 (`Distiller.step`), which also takes the last token of a row into the first and third, though no
target follows it.

Neither model's logits are ever held whole: see `loss.summed`. The vocabulary that both share is the student's; ids that
a larger one has besides are cut off (`teacher`), and ids that the teacher does not have get no probability from it.

Legend: B batch, T tokens, D d_model of the student, E of the teacher, V padded vocabulary.
"""

import dataclasses
import json
from typing import Literal

import jax
import jax.numpy as jnp

from meshgpt.errors import UserError
from meshgpt.models import flops
from meshgpt.models.model import GPT2Config, GPTJConfig, Model, ModelConfig, parameter_shapes
from meshgpt.models.precision import Float
from meshgpt.objectives.loss import Counted, Loss, NextToken, Scored, Softmax, Teacher, summed
from meshgpt.settings import settings
from meshgpt.trees import Tree

TEACHER = "teacher"
"""Where the teacher's parameters are in what a run reads and never changes."""

_EPSILON = 1e-12  # of the squared norms, as PyTorch's CosineEmbeddingLoss


@settings("objective")
class Distill:
    """The objective of distillation; the defaults are DistilGPT2's."""

    teacher: str
    """The model to learn from: a run's folder, an imported one, a Hugging Face folder (in 4 or 8 bits too) or a hub id
    (owner/name)."""
    temperature: float = 2.0
    """Divisor of the logits of both models before their distributions are compared."""
    alpha_ce: float = 5.0
    """Weight of the divergence from the teacher's distribution."""
    alpha_mlm_or_clm: float = 2.0
    """Weight of the usual next-token loss."""
    alpha_cos: float = 1.0
    """Weight of the cosine distance of the last hidden states; give 0 for a teacher of another width."""
    start: Literal["teacher", "fresh"] = "teacher"
    """Where the student starts: `teacher` takes layers and embeddings of the teacher, unless --init names another
    start, and `fresh` random numbers."""
    layers: tuple[int, ...] = ()
    """Layers of the teacher to start from, counted from 0; when empty they are taken evenly, every other one for half
    of them."""
    teacher_dtype: Float = "bfloat16"
    """Dtype that the teacher is kept in; weights of 4 and 8 bits stay as they are."""
    chunk_tokens: int = 4096
    """Number of tokens whose logits, of both models, one device holds at a time."""
    teacher_model: GPT2Config | GPTJConfig = GPT2Config()
    """The teacher's sizes; a run reads them from the teacher, and what is compiled without it takes these."""

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.chunk_tokens < 1:
            raise UserError(
                f"objective.temperature={self.temperature}, objective.chunk_tokens={self.chunk_tokens}: "
                "the first must be positive, the second at least 1"
            )
        alphas = (self.alpha_ce, self.alpha_mlm_or_clm, self.alpha_cos)
        if min(alphas) < 0 or not any(alphas[:2]):
            raise UserError(
                f"objective.alpha_ce, alpha_mlm_or_clm, alpha_cos = {alphas}: none may be negative, and one of the "
                "first two must be positive"
            )

    @property
    def plain(self) -> NextToken:
        """What validation reports: the student's own next-token loss."""
        return NextToken(chunk_tokens=self.chunk_tokens)

    def teacher_for(self, student: Model) -> Model:
        """The teacher as a model beside `student`: its sizes, with the vocabulary padded as the student's.

        Raises:
          UserError: a cosine between vectors of different widths.
        """
        rows, config = student.config.padded_vocab, self.teacher_model
        if self.alpha_cos and config.d_model != student.config.d_model:
            raise UserError(
                f"objective.alpha_cos={self.alpha_cos}: the teacher's hidden states have {config.d_model} numbers and "
                f"the student's {student.config.d_model}, and no cosine between them; give --objective.alpha-cos 0"
            )
        if config.n_positions < student.config.n_positions:
            raise UserError(
                f"the teacher has {config.n_positions} positions and the student {student.config.n_positions}: "
                f"give --model.n-positions {config.n_positions}"
            )
        known = min(config.vocab_size, student.config.vocab_size)
        config = dataclasses.replace(config, vocab_size=known, vocab_multiple=rows)
        precision = dataclasses.replace(student.precision, params=self.teacher_dtype, rounding="nearest")
        return dataclasses.replace(student, config=config, precision=precision)

    def abstract_frozen(self, model: Model) -> Tree:
        """Shapes, dtypes and shardings of what the loss reads beside `model`'s parameters."""
        return {TEACHER: self.teacher_for(model).abstract_params()}

    def loss(self, model: Model, frozen: Tree, document_end: int | None) -> Loss:
        """The three losses of `model` beside the teacher in `frozen`."""
        taught = self.teacher_for(model)

        def loss(params: Tree, tokens: jax.Array, weights: jax.Array, key: jax.Array | None) -> tuple:
            student, teacher = model.bind(params), taught.bind(frozen[TEACHER])
            x_BTD = student.hidden(tokens[:, :-1], key, document_end)
            x_BTE = teacher.hidden(tokens[:, :-1], None, document_end)
            beside = Teacher(x_BTE, teacher.head())
            total, nats = summed(x_BTD, student.head(), tokens[:, 1:], weights, self, beside)
            assert nats is not None
            if self.alpha_cos:
                total = total + self.alpha_cos * jnp.sum(weights * (1 - cosine(x_BTD, x_BTE)))
            return total, Counted(jnp.sum(weights), nats)

        return loss

    def flops_beside(self, student: ModelConfig, seq_len: int) -> int:
        """Floating-point operations a token of the teacher's forward pass."""
        config = self.teacher_model
        vocab = min(config.vocab_size, student.vocab_size)
        return flops.forward(parameter_shapes(config), vocab, seq_len).total

    def score(
        self, student_logits: jax.Array, is_target: jax.Array, weights_bc: jax.Array, teacher_logits: jax.Array | None
    ) -> Scored:
        """The first two losses, summed over tokens, and their gradient with respect to the student's logits."""
        assert teacher_logits is not None, "distillation without a teacher"
        temperature, own = self.temperature, NextToken().score(student_logits, is_target, weights_bc, None)
        s, t = Softmax.of(student_logits / temperature), Softmax.of(teacher_logits / temperature)
        p_student, p_teacher = s.exp / s.normaliser[..., None], t.exp / t.normaliser[..., None]
        # -inf where an id is padding: there the teacher gives no probability, and 0 log 0 is 0.
        known = jnp.isfinite(teacher_logits) & jnp.isfinite(student_logits)
        difference = jnp.where(known, (teacher_logits - student_logits) / temperature, 0.0)
        divergence = jax.lax.psum(jnp.sum(p_teacher * difference, -1), "tensor") - t.logsumexp + s.logsumexp
        loss = jnp.sum(weights_bc * divergence) * (self.alpha_ce * temperature**2) + self.alpha_mlm_or_clm * own.total
        slope = weights_bc[..., None] * (p_student - p_teacher)
        gradient = slope * (self.alpha_ce * temperature) + self.alpha_mlm_or_clm * own.slope
        return Scored(loss, gradient, own.total)


def cosine(x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
    """(B, T) float32: the cosine of the vectors of each token, as PyTorch's CosineEmbeddingLoss has it."""
    x, y = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)
    squares = (jnp.square(x).sum(-1) + _EPSILON) * (jnp.square(y).sum(-1) + _EPSILON)
    return (x * y).sum(-1) * jax.lax.rsqrt(squares)


def chosen_layers(objective: Distill, student_layers: int) -> tuple[int, ...]:
    """The teacher's layers that the student starts from.

    Raises:
      UserError: another number of them than the student has, or ones that the teacher does not have.
    """
    depth = objective.teacher_model.n_layers
    chosen = objective.layers or tuple(i * depth // student_layers for i in range(student_layers))
    if len(chosen) != student_layers:
        raise UserError(
            f"objective.layers={json.dumps(chosen)} names {len(chosen)} layers and the student has {student_layers}: "
            f"give as many, or --model.n-layers {len(chosen)}"
        )
    if not all(0 <= layer < depth for layer in chosen):
        raise UserError(f"objective.layers={json.dumps(chosen)}: the teacher has layers 0 to {depth - 1}")
    return chosen
