"""`Run`: everything that decides a training run, composed of the parts' own dataclasses; and Run as JSON, both ways."""

import dataclasses
import re
import types
import typing
from typing import Any, Literal, TypeAlias

from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.data.mixture import Stage, check_stages
from meshgpt.data.prepare import Prepare
from meshgpt.distributed.mesh import MeshShape
from meshgpt.errors import UserError
from meshgpt.models.layers import Execution, check_documents
from meshgpt.models.model import GPT2Config, GPTJConfig
from meshgpt.models.precision import Precision
from meshgpt.models.trainable import Full, Trainable
from meshgpt.objectives.distillation import Distill
from meshgpt.objectives.loss import NextToken
from meshgpt.optim.config import AdamW, Optimizer
from meshgpt.settings import settings

Objective: TypeAlias = NextToken | Distill


@settings("data")
class Data:
    """Where the tokens come from."""

    store: str = ""
    """A folder made by `meshgpt prepare`. Where it is empty, `prepare` says what to make first."""
    prepare: Prepare | None = None
    """What to make; its `out` may be empty, and is then `data` in the run's folder."""
    mixture: tuple[Stage, ...] = ()
    """Several stores, by weight or token budget, one stage after another; takes the place of `store` and `prepare`."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """All documents end to end, cut every seq_len tokens; or whole documents side by side (`meshgpt data pack`)."""
    mask_documents: bool = False
    """Attention and positions stop at the ends of documents; proved by gradient on the run's first batch."""

    def __post_init__(self) -> None:
        if self.mixture and (self.store or self.prepare):
            raise UserError("data.mixture takes the place of data.store and data.prepare: give one of them")
        check_stages(self.mixture)


@settings("evals")
class Evals:
    """What is measured on the way besides the run's own held-out text (docs/evaluation.md)."""

    every: int = 0
    """Steps between these; 0 takes eval_every. The last step is always measured."""
    stores: tuple[str, ...] = ()
    """NAME=FOLDER of token stores: their held-out text, or all of it where none is held out. In nats a token."""
    choices: tuple[str, ...] = ()
    """Files in HellaSwag's form (JSON lines with ctx, endings, label)."""
    tasks: tuple[str, ...] = ()
    """Tasks, groups or tags of the lm-evaluation-harness, such as hellaswag."""
    tasks_path: str = ""
    """A folder with tasks of your own (.yaml); they may run Python."""
    num_fewshot: int | None = None
    """Solved examples before each question of a task; by default what the task says, or none."""
    limit: int = 0
    """Only the first so many questions of each file and task: a try, which is shown as one; 0 takes all."""
    max_gen_toks: int = 0
    """Most tokens of a generated answer; 0 is what the task says."""

    def __post_init__(self) -> None:
        for name in ("every", "limit", "num_fewshot", "max_gen_toks"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"--evals.{name.replace('_', '-')} {getattr(self, name)}: this cannot be negative")
        names = [self.store_name(store) for store in self.stores]
        for store, name in zip(self.stores, names, strict=True):
            if not re.fullmatch(r"[\w.-]+", name) or not store.partition("=")[2]:
                raise UserError(f"--evals.stores {store!r}: give NAME=FOLDER, such as wiki=stores/wiki")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"--evals.stores: two are called {twice!r}; give each its own name")

    @staticmethod
    def store_name(store: str) -> str:
        """What a store's figures are called, of its NAME=FOLDER."""
        return store.partition("=")[0]


@settings("samples")
class Samples:
    """Texts written at the end of a run, to `samples.txt` and the console."""

    prompts: tuple[str, ...] = ("",)
    """What to go on from, one text each; an empty one starts a new text. None at all: write no samples."""
    max_new_tokens: int = 100
    temperature: float = 0.8
    top_p: float = 0.95


@settings()
class Run:
    """A training run."""

    model: GPT2Config | GPTJConfig
    data: Data
    steps: int
    """Optimizer steps."""
    global_batch: int
    """Sequences in a step, over all devices and accumulated microbatches."""
    seq_len: int = 0
    """Tokens of a sequence; 0 takes the model's n_positions."""
    accumulate: int = 1
    """Microbatches that a step is cut into."""
    seed: int = 0
    """Of the parameters, the order of the text, dropout and the samples."""
    init: str = ""
    """Start from these weights: a Hugging Face folder or hub id, Mesh-Transformer-JAX's, or an imported folder."""
    trainable: Trainable = Full()
    """All parameters; or the last layers, or low-rank adapters, of the weights of `init`."""
    optim: Optimizer = AdamW()
    objective: Objective = NextToken()
    precision: Precision = Precision()
    execution: Execution = Execution()
    mesh: MeshShape = MeshShape()
    eval_every: int = 250
    """Steps between evaluations on the held-out text; the last step is always evaluated."""
    eval_batches: int = 0
    """At most so many global batches an evaluation, from the start of the text: a try, and shown as one; 0 takes the
    whole held-out text."""
    evals: Evals = Evals()
    log_every: int = 10
    """Steps between lines of metrics."""
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides the console and metrics.jsonl: `tensorboard/` in the run's folder, Weights & Biases."""
    max_bad_steps: int = 20
    """Stop after so many steps in a row whose loss, gradient, learning rate or updated parameters are not finite."""
    check_replicas_every: int = 0
    """Compare the replicas of parameters, optimizer state and gradients, bit for bit, after every so many steps, and
    the state before each save: a device that computes wrongly is named before a checkpoint is spoiled. 0 does not."""
    checkpointing: Checkpointing = Checkpointing()
    samples: Samples = Samples()
    export: Literal["none", "float32", "bfloat16", "float16"] = "float32"
    """Write a Hugging Face folder at the end, in this dtype."""
    run_dir: str = ""
    """The run's folder; empty takes runs/<recipe>."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on where the folder's run stopped, if there is one; never (an earlier run is set aside); or fail without."""
    resume_with_changes: bool = False
    """Go on with another optimizer, schedule, precision or batch size than before; docs/memory.md says what becomes of
    the optimizer's state and of the data's order. Only what the run was not told before has to be told so."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "accumulate", "eval_every", "log_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: give at least 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: give a number from 0 to {2**32 - 1}")
        for name in ("seq_len", "eval_batches", "check_replicas_every"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: this cannot be negative")
        if self.seq_len > self.model.n_positions:
            raise UserError(
                f"--seq-len {self.seq_len} is above the model's {self.model.n_positions} positions: "
                f"lower it, or raise --model.n-positions"
            )
        if self.data.mask_documents:
            check_documents(self.execution.attention)
        if self.global_batch % self.accumulate:
            raise UserError(
                f"--global-batch {self.global_batch} cannot be cut into --accumulate {self.accumulate} equal parts; "
                f"for example --global-batch {-(-self.global_batch // self.accumulate) * self.accumulate}"
            )

    @property
    def sequence_length(self) -> int:
        return self.seq_len or self.model.n_positions


# What may differ when a run is resumed: none of it changes what the steps done so far have computed. The tokens
# themselves are compared by their digest (`training.data.RunData.check_unchanged`), so that a store may be moved.
RESUMABLE = (
    *("steps", "accumulate", "execution", "mesh", "eval_every", "eval_batches", "evals", "log_every", "max_bad_steps"),
    *("sinks", "check_replicas_every"),
    *("checkpointing", "samples", "export", "run_dir", "resume", "data.store", "data.prepare.workers"),
    *("data.prepare.overwrite", "resume_with_changes"),
)

# What may differ where it is asked for (`--resume-with-changes`): `start` carries a run over. `init`, of a base that
# has moved: what it holds is compared by its digest.
CHANGEABLE = ("optim", "precision", "global_batch", "init")


def may_differ(name: str) -> bool:
    """Whether the field of this dotted name may be another one when a run is resumed."""
    return _under(name, RESUMABLE)


def may_change(name: str) -> bool:
    """Whether it may with `--resume-with-changes`."""
    return _under(name, CHANGEABLE)


def _under(name: str, fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)


def to_json(value: Any) -> Any:
    """A dataclass as JSON: an object with its fields and, so that a union can be read back, its `type`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    return value


def from_json(hint: Any, value: Any, where: str = "run") -> Any:
    """The inverse of `to_json` for a value annotated as `hint`; `where` names it in errors.

    Raises:
      UserError: for a field or a type that this version does not have.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, dict):
        classes = [option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)]
        for cls in classes:
            if cls.__name__ == value.get("type"):
                return _dataclass_from_json(cls, value, where)
        raise UserError(f"{where} is a {value.get('type')!r}, which this version of meshgpt does not know")
    if isinstance(value, list):
        items = [typing.get_args(option)[0] for option in options if typing.get_origin(option) is tuple]
        if not items:
            raise UserError(f"{where} is a list, which this version of meshgpt does not know")
        return tuple(from_json(items[0], element, f"{where}[{index}]") for index, element in enumerate(value))
    return value


def _dataclass_from_json(cls: Any, value: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls)
    unknown = value.keys() - hints.keys() - {"type"}
    if unknown:
        raise UserError(f"{where}.{min(unknown)} is not known to this version of meshgpt")
    fields = {name: from_json(hints[name], value[name], f"{where}.{name}") for name in value if name != "type"}
    try:
        return cls(**fields)
    except TypeError as error:
        raise UserError(f"{where} cannot be read by this version of meshgpt: {error}") from error


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """(name, old, new) of everything in which two JSON values differ, by dotted name."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(old) + [name for name in new if name not in old]
        return [d for name in names for d in differences(old.get(name), new.get(name), f"{where}.{name}".lstrip("."))]
    return [] if old == new else [(where, old, new)]
