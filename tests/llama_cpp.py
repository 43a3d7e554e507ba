"""Greedy tokens of llama.cpp, in a process of its own: python llama_cpp.py REQUEST.json > answers.json

REQUEST has `files` (GGUF), `prompts` (lists of token ids), `banned` (ids that are not chosen: llama.cpp's answer lacks
those that are a part of a character) and `new`, how many tokens to generate. An answer is [id, log-probability] of each
new token of each prompt of each file.
"""

import json
import sys
from pathlib import Path

import xllamacpp


def answers(file: str, request: dict) -> list[list[tuple[int, float]]]:
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_parallel = 1
    params.warmup = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds more
    server = xllamacpp.Server(params)
    bias = [[index, False] for index in request["banned"]]
    found = []
    for prompt in request["prompts"]:
        asked = {"prompt": prompt, "max_tokens": request["new"], "temperature": 0.0, "logprobs": 1, "logit_bias": bias}
        (answer,) = server.handle_completions(asked)["choices"]
        found.append([(token["id"], token["logprob"]) for token in answer["logprobs"]["content"]])
    return found


if __name__ == "__main__":
    wanted = json.loads(Path(sys.argv[1]).read_text())
    json.dump([answers(file, wanted) for file in wanted["files"]], sys.stdout)
