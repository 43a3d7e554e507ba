"""The tokenizer that travels with an export: proved on text, or owned up to."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from meshgpt.convert.hf_names import ModelConfig
from meshgpt.convert.json_file import write_json
from meshgpt.data.special_tokens import GENERATION, TokenizerFiles, check_carried
from meshgpt.data.tokenizer import Tokenizer
from meshgpt.errors import UserError

_ONLY_SENTENCEPIECE = (
    "the tokenizer is exported as tokenizer.model alone, because no tokenizer.json gives its ids exactly "
    "(only sentencepiece BPE that leaves text as it is has one): load it with sentencepiece, not with AutoTokenizer"
)


NO_TOKENIZER = (
    "there is no tokenizer: the folder has weights and settings alone, and no end of text; copy the model's "
    "tokenizer.json into it, or give token ids"
)


def special_ids(tokenizer: Tokenizer | None, config: ModelConfig) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` and the like for config.json, as the tokenizer's source has them."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None}
    return tokenizer.stated.model_ids(tokenizer.eot_id, tokenizer.prefix_id, config.vocab_size)


def save_files(tokenizer: Tokenizer | None, config: ModelConfig, folder: Path) -> None:
    """Saves the tokenizer, if any, and generation_config.json beside a config.json; compares them with their source.

    Raises:
      UserError: naming what the folder that the tokenizer came from states and `folder` does not.
    """
    ids = special_ids(tokenizer, config)
    if tokenizer is None:
        write_json(folder / GENERATION, TokenizerFiles().generation(ids))
        return
    write_json(folder / GENERATION, tokenizer.stated.generation(ids))
    save_carried(tokenizer, folder, config.vocab_size)


def save_carried(tokenizer: Tokenizer, folder: Path, vocab_size: int | None = None) -> None:
    """Saves a tokenizer with the files beside it, and compares these with where it came from: see `check_carried`."""
    tokenizer.save(folder)
    source = tokenizer.stated.folder
    if source is not None and source.is_dir():
        check_carried(source, folder, vocab_size)


def save_tokenizer(
    tokenizer: Tokenizer | None, config: ModelConfig, folder: Path, tokens_BT: np.ndarray
) -> tuple[str, ...]:
    """Saves `tokenizer` into `folder`, as `save_files` does, and gives what has to be said about it.

    Where there is a tokenizer.json (which is what transformers, vllm and llama.cpp read), it is opened again and has to
    give the live tokenizer's ids on the text of `tokens_BT`.

    Raises:
      UserError: naming the first text on which the ids differ.
    """
    save_files(tokenizer, config, folder)
    if tokenizer is None:
        return (NO_TOKENIZER,)
    if not (folder / "tokenizer.json").is_file():
        return (_ONLY_SENTENCEPIECE,)
    import tokenizers

    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in _texts(tokenizer, tokens_BT):
        if saved.encode(text, add_special_tokens=False).ids != tokenizer.encode(text):
            raise UserError(f"{folder}/tokenizer.json gives other ids than the tokenizer it was made from on {text!r}")
    return ()


def _texts(tokenizer: Tokenizer, tokens_BT: np.ndarray) -> Iterator[str]:
    """The text of every row, up to the first end of text: written out, that would be a token again."""
    for row in tokens_BT.tolist():
        # A model may have more rows than its tokenizer, and a vocabulary may have holes.
        ids = [i for i in row if i < tokenizer.vocab_size and tokenizer.decodable[i]]
        yield tokenizer.decode(ids[: ids.index(tokenizer.eot_id)] if tokenizer.eot_id in ids else ids)
