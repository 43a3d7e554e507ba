"""Where a model comes from: a Hugging Face folder, a hub id or a checkpoint of Mesh-Transformer-JAX, opened alike."""

import dataclasses
from pathlib import Path

from meshgpt import trees
from meshgpt.convert import hub, mesh_transformer_read
from meshgpt.convert.adam_state import Moments
from meshgpt.convert.hf_config import read_config
from meshgpt.convert.hf_names import ModelConfig
from meshgpt.convert.hf_read import fitting, heads_of_others, place, place_as_kept
from meshgpt.convert.surgery import Surgery, operate
from meshgpt.convert.tensors import Tensors, open_tensors
from meshgpt.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A model whose every tensor is there and fits; nothing is read yet.

    origin: what it was opened by. config: its architecture, after surgery. tokenizer: the folder that `load_tokenizer`
    reads, None if there is none. step: updates it was trained for, 0 where the format does not say. notes: what was
    decided or changed on the way, to be said and recorded. changed: whether surgery made another model of it. adam:
    None where `load_moments` has nothing to load.
    """

    origin: str
    config: ModelConfig
    tokenizer: Path | None
    step: int
    notes: tuple[str, ...]
    changed: bool
    tensors: Tensors
    adam: mesh_transformer_read.Adam | None

    def load(self, abstract: trees.Tree) -> trees.Tree:
        """The parameters, placed like `abstract`, those of few bits dequantized: see `read.place`."""
        return place(self.tensors, self.config, abstract)

    def load_as_kept(self, abstract: trees.Tree) -> trees.Tree:
        """The same, but weights of 4 and 8 bits stay in these: see `read.place_as_kept`."""
        return place_as_kept(self.tensors, self.config, abstract)

    def load_moments(self, abstract_mu: trees.Tree, abstract_nu: trees.Tree) -> Moments:
        """The optimizer's state, placed like the two trees: the parameters' shapes in the dtypes of the moments."""
        if self.adam is None:
            raise UserError(f"{self.origin} has no optimizer state to continue with: start a new optimizer")
        return Moments(
            mu=place(self.adam.mu, self.config, abstract_mu),
            nu=place(self.adam.nu, self.config, abstract_nu),
            count=self.adam.count,
        )


def open_source(source: str, surgery: Surgery = Surgery()) -> Source:
    """Opens a local folder (Hugging Face's format, or Mesh-Transformer-JAX's `step_N`), or else a model on the hub.

    Every tensor's name and shape is checked here, before anything is allocated.

    Args:
      source: a folder, or `owner/name` or `owner/name@revision` on the hub.
      surgery: what to change on the way.

    Raises:
      UserError: nothing there, another architecture, files that are missing, cut short or hold anything but tensors,
        tensors that do not fit the configuration (all of them listed), no network, no room for the download.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and mesh_transformer_read.is_checkpoint(folder):
        return _from_mesh_transformer(source, folder, surgery)
    if not folder.is_dir():
        if folder.exists() or not hub.is_id(source):
            raise UserError(f"{source} is neither a folder nor a model's id on the hub (owner/name)")
        folder = hub.download(source)
    config = read_config(folder)
    found = open_tensors(folder)
    ignored = heads_of_others(found) if surgery.ignore_extra else []
    kept = {name: entry for name, entry in found.entries.items() if name not in ignored}
    found = fitting(Tensors(origin=found.origin, entries=kept), config)
    tensors, config, changes = operate(found, config, surgery)
    notes = [f"left out, as --ignore-extra asks: {', '.join(ignored)}"] if ignored else []
    if any(entry.code == "F64" for entry in found.entries.values()):
        notes.append("weights in float64 are rounded to float32")
    return Source(
        origin=source,
        config=config,
        tokenizer=tokenizer_of(folder),
        step=0,
        notes=(*notes, *changes),
        changed=bool(changes),
        tensors=tensors,
        adam=None,
    )


def _from_mesh_transformer(source: str, folder: Path, surgery: Surgery) -> Source:
    found = mesh_transformer_read.read(folder)
    tensors, config, changes = operate(found.tensors, found.config, surgery)
    adam, notes = found.adam, [*found.notes, *changes]
    if adam is not None and changes:
        adam = None
        notes.append("the optimizer's state is left behind: it does not fit the changed tables")
    return Source(
        origin=source,
        config=config,
        tokenizer=tokenizer_of(folder),
        step=found.step,
        notes=tuple(notes),
        changed=bool(changes),
        tensors=tensors,
        adam=adam,
    )


def tokenizer_of(folder: Path) -> Path | None:
    """`folder` where `load_tokenizer` finds one in it."""
    there = any(folder.glob("*.model")) or any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return folder if there else None
