"""A tokenizer in a GGUF file: its tokens, merges, special ids and chat template, for llama.cpp's own BPE.

llama.cpp knows how text is cut before the merges only by a name. A tokenizer that cuts in another way is refused:
llama.cpp would give other ids, and say nothing.

Source: `src/llama-vocab.cpp` of llama.cpp (`LLAMA_VOCAB_PRE_TYPE_*`), `gguf-py/gguf/gguf_writer.py`.
"""

import json
import re
from typing import Any

from meshgpt.data.tokenizer import ByteLevelBPE, Tokenizer
from meshgpt.errors import UserError

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
# The steps before the merges, by llama.cpp's name for them.
_KNOWN = {"gpt-2": [_BYTES], "starcoder": [_DIGITS, _BYTES]}


def check_tokenizer(tokenizer: Tokenizer, form: str) -> None:
    """Raises UserError for a tokenizer of which llama.cpp would make other ids."""
    if not isinstance(tokenizer, ByteLevelBPE):
        raise UserError(f"{form}: llama.cpp's GPT-2 needs a byte-level BPE tokenizer, and this is sentencepiece")
    _name(json.loads(tokenizer.to_json()), form)


def add_tokenizer(gguf: Any, writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Adds a tokenizer that passed `check_tokenizer`; rows of the embedding that no id uses are padding."""
    assert isinstance(tokenizer, ByteLevelBPE), "checked"
    described = json.loads(tokenizer.to_json())
    added = {token["content"]: token["id"] for token in described["added_tokens"]}
    by_id = {index: word for word, index in (described["model"]["vocab"] | added).items()}
    kinds = dict.fromkeys(by_id, gguf.TokenType.NORMAL) | dict.fromkeys(added.values(), gguf.TokenType.USER_DEFINED)
    kinds |= dict.fromkeys(tokenizer.special_ids, gguf.TokenType.CONTROL)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name(described, "gguf"))
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([kinds.get(i, gguf.TokenType.UNUSED) for i in range(rows)])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.prefix_id)
    writer.add_eos_token_id(tokenizer.eot_id)
    writer.add_add_bos_token(False)  # nor does our `generate`, and GPT-2 was not trained with one
    for other in sorted(tokenizer.stop_ids - {tokenizer.eot_id})[:1]:  # llama.cpp knows two that end a text
        writer.add_eot_token_id(other)
    pads = tokenizer.stated.token("pad_token")
    pad = next((i for i, token in by_id.items() if token == pads), tokenizer.stated.ids.get("pad_token_id"))
    if isinstance(pad, int) and 0 <= pad < rows:
        writer.add_pad_token_id(pad)
    templates = tokenizer.stated.chat_templates()
    if "default" in templates:
        writer.add_chat_template(templates.pop("default"))
    named = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in sorted(templates.items())}
    for name, text in named.items():
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), text)
    if named:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, [*named])


def _name(described: dict[str, Any], form: str) -> str:
    """llama.cpp's name of how text is cut before the merges."""

    def refuse(what: str) -> UserError:
        return UserError(
            f"{form}: llama.cpp would give other ids than this tokenizer, which {what}; nf4 and int8 keep it"
        )

    model, before = described["model"], described["pre_tokenizer"] or {}
    if model["type"] != "BPE":
        raise refuse(f"is a {model['type']} model and not BPE")
    if described["normalizer"] is not None:
        raise refuse(f"changes the text first (normalizer {described['normalizer']['type']})")
    odd = next((name for name in ("ignore_merges", "dropout", "byte_fallback") if model.get(name)), None)
    odd = odd or next((n for n in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(n)), None)
    if odd is not None:
        raise refuse(f"has {odd} = {model[odd]!r}")
    strips = [t["content"] for t in described["added_tokens"] if not t["special"]
              and (t["lstrip"] or t["rstrip"] or t["single_word"])]  # fmt: skip
    if strips:
        raise refuse(f"takes the spaces around its added token {strips[0]!r} away, or wants a whole word")
    steps = [_plain(step) for step in before.get("pretokenizers", [before])]
    found = next((name for name, known in _KNOWN.items() if known == steps), None)
    if found is None:
        raise refuse(f"cuts the text by {json.dumps(steps)}")
    return found


def _plain(step: dict[str, Any]) -> dict[str, Any]:
    """A step without what changes no id, its defaults written out."""
    kept = {name: value for name, value in step.items() if name != "trim_offsets"}
    return {"use_regex": True, **kept} if step.get("type") == "ByteLevel" else kept
