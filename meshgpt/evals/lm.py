"""Our model as the lm-evaluation-harness sees one. The harness is imported inside functions: it is an extra."""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

from meshgpt.data.tokenizer import Tokenizer
from meshgpt.distributed import stopping
from meshgpt.errors import UserError
from meshgpt.evals.requests import pair_requests, windows
from meshgpt.evals.scoring import Progress, Scorer
from meshgpt.inference.generate import Generator
from meshgpt.inference.sampling import Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

_MAX_GEN_TOKS = 256  # what the harness's `hf` backend takes where a task does not say
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


def harness_lm(answers: "Answers") -> "LM":
    """What the harness asks, answered by `answers`. It sees one process, and every process of a run holds one."""
    from lm_eval.api.model import LM

    @final
    class HarnessLM(LM):
        def loglikelihood(self, requests: list["Instance"]) -> list[tuple[float, bool]]:
            return answers.loglikelihood([(context, text) for context, text in map(_arguments, requests)])

        def loglikelihood_rolling(self, requests: list["Instance"]) -> list[float]:
            return answers.rolling([text for (text,) in map(_arguments, requests)])

        def generate_until(self, requests: list["Instance"]) -> list[str]:
            return answers.generate([(context, settings) for context, settings in map(_arguments, requests)])

    return HarnessLM()


def _arguments(request: "Instance") -> tuple[Any, ...]:
    return request.arguments


@final
class Answers:
    """Scores and generates what the harness's `hf` backend does with the same weights, batches spread over the mesh.

    Every process is given all requests.
    """

    def __init__(self, scorer: Scorer, tokenizer: Tokenizer, report: Progress, max_gen_toks: int = 0) -> None:
        """max_gen_toks: most tokens of a generated answer, where that is less than a task asks for; 0 is no limit."""
        self._scorer, self._tokenizer, self._report = scorer, tokenizer, report
        self._max_gen_toks = max_gen_toks
        self._generator: Generator | None = None

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(ln p of the continuation, whether it is what greedy decoding gives) of each (context, continuation)."""
        requests = pair_requests(self._tokenizer, pairs)
        scores = self._scorer.score(requests, self._report, "log-likelihoods", decodable=self._tokenizer.decodable)
        return [(score.log_likelihood, score.greedy) for score in scores]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """ln p of each text, in windows side by side."""
        encoded = self._tokenizer.encode_batch([*texts])
        cut = [list(windows(tokens, self._tokenizer.prefix_id, self._scorer.context)) for tokens in encoded]
        scores = iter(self._scorer.score([window for each in cut for window in each], self._report, "documents"))
        return [sum(next(scores).log_likelihood for _ in each) for each in cut]

    def generate(self, asked: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """The continuation of each context, by its settings (a task's generation_kwargs), up to a stop sequence."""
        from lm_eval.models.utils import normalize_gen_kwargs

        encoded = self._tokenizer.encode_batch([context for context, _ in asked])
        groups: dict[str, list[int]] = {}
        for index, (_, settings) in enumerate(asked):
            name = json.dumps(normalize_gen_kwargs(settings, _MAX_GEN_TOKS), sort_keys=True)
            groups.setdefault(name, []).append(index)
        found, done = [""] * len(asked), 0
        for name in sorted(groups):
            generation = self._generation(json.loads(name))
            indices = sorted(groups[name], key=lambda index: (-len(encoded[index]), encoded[index]))
            rows = self._scorer.rows(self._scorer.context)
            for start in range(0, len(indices), rows):
                part = indices[start : start + rows]
                stopping.check()
                for index, text in zip(part, generation([encoded[index] for index in part]), strict=True):
                    found[index] = text
                done += len(part)
                self._report("generating", done, len(asked))
        return found

    def _generation(self, settings: dict[str, Any]) -> Callable[[list[list[int]]], list[str]]:
        """Prompts to texts, by what the harness asks for."""
        from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text

        unknown = sorted(settings.keys() - _KNOWN)
        if unknown:
            raise UserError(
                f"a task asks for generation with {unknown[0]}={settings[unknown[0]]!r}, which meshgpt does not do: "
                f"leave that task out, or give it by --tasks-path with generation_kwargs of {', '.join(sorted(_KNOWN))}"
            )
        wanted = min(settings["max_gen_toks"], self._max_gen_toks or settings["max_gen_toks"])
        room = self._scorer.context - wanted
        if room < 1:
            raise UserError(
                f"a task asks for up to {wanted} generated tokens, and the model's context is {self._scorer.context}: "
                f"give --max-new-tokens {max(1, self._scorer.context // 2)} (of a run --evals.max-gen-toks), or another"
            )
        sampling = Sampling(
            max_new_tokens=wanted,
            temperature=settings.get("temperature", 1.0) if settings["do_sample"] else 0.0,
            top_k=settings.get("top_k", 0) if settings["do_sample"] else 0,
            top_p=settings.get("top_p", 1.0) if settings["do_sample"] else 1.0,
        )
        tokenizer = self._tokenizer
        stops = handle_stop_sequences(settings["until"], eos=tokenizer.decode([tokenizer.eot_id]))

        def enough(tokens: list[int]) -> bool:
            text = tokenizer.decode(tokens)
            return any(stop in text for stop in stops if stop)

        def texts(prompts: Sequence[list[int]]) -> list[str]:
            if self._generator is None:
                self._generator = Generator(self._scorer.model, self._scorer.params)
            cut = [prompt[-room:] for prompt in prompts]
            samples = self._generator.generate(
                cut,
                sampling,
                stop_ids=tokenizer.stop_ids,
                begin_id=tokenizer.prefix_id,
                decodable=tokenizer.decodable,
                enough=enough,
            )
            return [postprocess_generated_text(tokenizer.decode(tokens), stops, None) for (tokens,) in samples]

        return texts
