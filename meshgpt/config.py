"""`Run`: everything that decides a training run, composed of the parts' own dataclasses; and Run as JSON, both ways."""

import dataclasses
import re
import types
import typing
from typing import Any, Literal, TypeAlias

from meshgpt.checkpoint.manager import Checkpointing
from meshgpt.data.mixture import LONGEST, Stage, check_stages
from meshgpt.data.prepare import Prepare
from meshgpt.distributed.mesh import MeshShape
from meshgpt.errors import UserError
from meshgpt.flags import OTHER_NAMES
from meshgpt.models.layers import Execution, check_documents
from meshgpt.models.model import GPT2Config, GPTJConfig
from meshgpt.models.precision import Precision
from meshgpt.models.trainable import Full, Trainable
from meshgpt.objectives.distillation import Distill
from meshgpt.objectives.loss import NextToken
from meshgpt.optim.config import AdamW, Optimizer
from meshgpt.settings import ADDED_LATER, settings

Objective: TypeAlias = NextToken | Distill


@settings("data")
class Data:
    """Where the tokens come from."""

    store: str = ""
    """Folder of a token store made by `meshgpt prepare`; when it is empty, `prepare` says what to make first."""
    prepare: Prepare | None = None
    """What to prepare before training; its `out` may be empty and is then `data` in the run's folder."""
    mixture: tuple[Stage, ...] = ()
    """Stages that draw from several stores, by weight or by token budget, one stage after another; takes the place of
    `store` and `prepare`."""
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents fill sequences: `concatenate` joins them end to end and cuts every seq_len tokens, `best_fit`
    places whole documents side by side (after `meshgpt data pack`)."""
    mask_documents: bool = False
    """Stop attention and positions at the ends of documents; this is proved by gradient on the run's first batch."""

    def __post_init__(self) -> None:
        if self.mixture and (self.store or self.prepare):
            raise UserError("data.mixture takes the place of data.store and data.prepare: give one of them")
        check_stages(self.mixture)


@settings("evals")
class Evals:
    """What is measured on the way besides the run's own held-out text (docs/evaluation.md)."""

    every: int = 0
    """Steps between these evaluations; 0 takes eval_every. The last step is always measured."""
    stores: tuple[str, ...] = ()
    """Token stores to measure, each as NAME=FOLDER: their held-out text, or all of it where none is held out, in nats a
    token."""
    choices: tuple[str, ...] = ()
    """Multiple-choice files in HellaSwag's form (JSON lines with ctx, endings, label)."""
    tasks: tuple[str, ...] = ()
    """Tasks, groups or tags of the lm-evaluation-harness, such as hellaswag."""
    tasks_path: str = ""
    """Folder with tasks of your own (.yaml files, which may run Python)."""
    num_fewshot: int | None = None
    """Number of solved examples before each question of a task; None takes what the task says."""
    limit: int = 0
    """Number of questions taken from each file and task, the first ones, for a try, which is shown as one; 0 takes
    all."""
    max_gen_toks: int = dataclasses.field(default=0, metadata={OTHER_NAMES: ("max_new_tokens", "max_tokens")})
    """Largest number of tokens in a generated answer; 0 takes what the task says."""

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
    """Texts to continue; an empty one starts a new text, and no prompt at all writes no samples."""
    max_new_tokens: int = dataclasses.field(default=100, metadata={OTHER_NAMES: ("max_tokens",)})
    """Largest number of tokens generated for each prompt."""
    temperature: float = 0.8
    """Divisor of the logits before sampling; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Sample from the fewest tokens whose probabilities sum to at least this; 1 samples from all."""


@settings()
class Run:
    """A training run."""

    model: GPT2Config | GPTJConfig
    """The model's family and sizes."""
    data: Data
    """Where the tokens come from."""
    steps: int
    """Number of optimizer steps that the learning-rate schedule is made for."""
    extend: int = 0
    """Number of further steps for which a finished run goes on after `steps`; `extend_schedule` sets their rate."""
    extend_schedule: Literal["constant", "rewarmed"] = "constant"
    """Learning rate of the steps of `extend`: constant stays at the rate that the schedule ended with; rewarmed rises
    to the peak in a tenth of them and decays over the others as the schedule did."""
    global_batch: int
    """Number of sequences in a step, over all devices and accumulated microbatches."""
    seq_len: int = 0
    """Number of tokens in a sequence; 0 takes the model's n_positions."""
    accumulate: int = 1
    """Number of microbatches that each step's batch is cut into, one after another."""
    seed: int = 0
    """Seed of the parameters, the order of the text, dropout and the samples."""
    init: str = ""
    """Weights to start from: a Hugging Face folder or hub id, a checkpoint of Mesh-Transformer-JAX, or an imported
    folder; when it is empty, parameters are drawn at random."""
    trainable: Trainable = Full()
    """What is trained: all parameters, the last layers, or low-rank adapters beside the weights of `init`."""
    optim: Optimizer = AdamW()
    """The optimizer, its learning rate and its schedule."""
    objective: Objective = NextToken()
    """What is minimised: the next-token loss, or the loss of distillation."""
    precision: Precision = Precision()
    """The dtypes of parameters and of computation."""
    execution: Execution = Execution()
    """How the layers run on a device."""
    mesh: MeshShape = MeshShape()
    """How devices are arranged."""
    eval_every: int = 250
    """Steps between evaluations on the held-out text; the last step is always evaluated."""
    eval_batches: int = 0
    """Largest number of global batches in an evaluation, from the start of the text, for a try, which is shown as one;
    0 takes the whole held-out text."""
    evals: Evals = Evals()
    """What is measured on the way besides the run's own held-out text."""
    log_every: int = 10
    """Steps between lines of metrics."""
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides the console and metrics.jsonl: `tensorboard` writes to tensorboard/ in the run's folder,
    `wandb` sends to Weights & Biases."""
    max_bad_steps: int = 20
    """Stop after this many steps in a row whose loss, gradient, learning rate or updated parameters are not finite."""
    check_replicas_every: int = 0
    """Steps between bit-for-bit comparisons of the replicas of parameters, optimizer state and gradients, made before
    each save too, which name a device that computes wrongly before a checkpoint is spoiled; 0 makes none."""
    checkpointing: Checkpointing = Checkpointing()
    """When checkpoints are saved and which are kept."""
    samples: Samples = Samples()
    """Texts that the trained model writes at the end."""
    export: Literal["none", "float32", "bfloat16", "float16"] = "float32"
    """Dtype of the Hugging Face folder that is written at the end; `none` writes no folder."""
    run_dir: str = ""
    """The run's folder; when it is empty, runs/<recipe>."""
    resume: Literal["auto", "never", "must"] = "auto"
    """What to do with a run that is already in the folder: `auto` goes on with it if there is one, `must` fails if
    there is none, `never` sets it aside and starts again."""
    resume_with_changes: bool = False
    """Go on with another optimizer, schedule, precision or batch size than before; docs/memory.md says what becomes of
    the optimizer's state and of the data's order. It needs giving only when the change is made."""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "accumulate", "eval_every", "log_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: give at least 1")
        if self.last_step >= 2**31:
            raise UserError(f"--steps {self.last_step}: steps are counted in 32 bits, up to {2**31 - 1}")
        if self.last_step * self.global_batch > LONGEST:
            raise UserError(
                f"--steps {self.last_step} of --global-batch {self.global_batch} are more than the {LONGEST:,} "
                "sequences that can be counted: lower one of them"
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: give a number from 0 to {2**32 - 1}")
        for name in ("extend", "seq_len", "eval_batches", "check_replicas_every"):
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
    def last_step(self) -> int:
        """The step that ends the run: of the schedule and of what extends it."""
        return self.steps + self.extend

    @property
    def sequence_length(self) -> int:
        return self.seq_len or self.model.n_positions


# What may differ when a run is resumed: none of it changes what the steps done so far have computed. The tokens
# themselves are compared by their digest (`training.data.RunData.check_unchanged`), so that a store may be moved.
RESUMABLE = (
    *("steps", "extend", "extend_schedule", "accumulate", "execution", "mesh", "eval_every", "eval_batches", "evals"),
    *("log_every", "max_bad_steps", "sinks", "check_replicas_every", "checkpointing", "samples", "export", "run_dir"),
    *("resume", "data.store", "data.prepare.workers", "data.prepare.overwrite", "resume_with_changes"),
)

# What may differ where it is asked for (`--resume-with-changes`): `init_or_restore` carries a run over. `init`, of a
# base that has moved: what it holds is compared by its digest.
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
        fields = {
            field.name: to_json(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if not (field.metadata.get(ADDED_LATER) and getattr(value, field.name) == field.default)
        }
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


def changes(recorded: dict[str, Any], run: Run) -> list[tuple[str, Any, Any]]:
    """(name, then, now) of every setting in which a run differs from one that was recorded as JSON.

    A setting that the recorded run's version of meshgpt did not have had its default.

    Raises:
      UserError: what was recorded has a setting or a type that this version does not have.
    """
    return differences(to_json(from_json(Run, recorded)), to_json(run))


def differences(old: Any, new: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """(name, old, new) of everything in which two JSON values differ, by dotted name."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = list(old) + [name for name in new if name not in old]
        return [d for name in names for d in differences(old.get(name), new.get(name), f"{where}.{name}".lstrip("."))]
    return [] if old == new else [(where, old, new)]
