"""Models on the Hugging Face hub, by id, in the hub's own cache.

`huggingface_hub` does the downloading; its environment variables hold: `HF_HOME` and `HF_HUB_CACHE` (where the cache
is), `HF_HUB_OFFLINE=1` (only what is cached), `HF_TOKEN`, `HF_ENDPOINT`.
"""

import re
import shutil
from pathlib import Path
from typing import Any

from meshgpt.errors import MachineError, UserError, explained

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

# By name and never by a bare suffix: repositories hold the same weights in half a dozen formats, and code.
_SMALL = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
]
_SAFETENSORS = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]
_TORCH = ["pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json"]


def is_id(source: str) -> bool:
    """Whether `source` can be a hub id: `gpt2`, `owner/name`, either with `@revision`."""
    return _ID.fullmatch(source.partition("@")[0]) is not None


def download(source: str) -> Path:
    """The folder in the hub's cache of the model `source` (`owner/name` or `owner/name@revision`), up to date.

    safetensors are preferred; `pytorch_model.bin` is downloaded only where there are none.

    Raises:
      UserError: `huggingface_hub` is not installed, no such model, no access, or no room on the disk.
      MachineError: the hub does not answer, or breaks off.
    """
    folder = _snapshot(source, [*_SMALL, *_SAFETENSORS])
    if not any(folder.glob("*.safetensors")):
        folder = _snapshot(source, [*_SMALL, *_TORCH])
    return folder


def _snapshot(source: str, patterns: list[str]) -> Path:
    hub = _library(source)
    name, _, revision = source.partition("@")
    errors = hub.errors
    try:
        _check_room(hub, source, patterns)
        return Path(hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise UserError(
            f"{source} on the hub wants its terms accepted first: accept them on its page, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} on the hub has no revision {revision!r}: name a branch, a tag or a commit") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"there is no folder {name!r} here, and no such model on the hub (or it is private: set HF_TOKEN)"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # offline, or nobody answered, and the cache has it not or not all
        raise (UserError if hub.constants.HF_HUB_OFFLINE else MachineError)(
            f"{source} is neither a folder here nor complete in the hub's cache, and the hub cannot be reached "
            f"({_reason(error)}); check the network, or name a local folder"
        ) from error
    except (OSError, errors.HTTPError) as error:
        text = f"downloading {source} from the hub failed: {_reason(error)}; try again"
        raise (explained(error, text) if isinstance(error, OSError) else MachineError(text)) from error


def _library(source: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(
            f"there is no folder {source!r} here; to read it from the hub: pip install 'meshgpt[hf]'"
        ) from error
    return huggingface_hub


def _check_room(hub: Any, source: str, patterns: list[str]) -> None:
    name, _, revision = source.partition("@")
    try:
        files = hub.snapshot_download(name, revision=revision or None, allow_patterns=patterns, dry_run=True)
    except hub.errors.DryRunError:  # the hub cannot be reached: whatever is in the cache is all there will be
        return
    wanted = sum(file.file_size or 0 for file in files if file.will_download)
    cache = Path(hub.constants.HF_HUB_CACHE).expanduser()
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if wanted > free:
        raise UserError(
            f"{source} is {wanted:,} bytes to download and {there} has {free:,} free: "
            "free some space, or set HF_HUB_CACHE to another disk"
        )


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # the hub wraps the reason in advice of its own
        error = error.__cause__
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
