"""A model of lm-evaluation-harness on our backends: a run's checkpoints or an exported folder, nothing converted.

    import yoco_megatron.evaluation.lm_eval_model
    lm_eval.simple_evaluate(model="yoco", model_args={"load": "RUN/checkpoints"}, tasks=[...])

tools/run_lm_eval.py does it from the command line. Texts become tokens as in lm-eval's own class `hf`, and the scores
are those that it gives the exported model: padding of the vocabulary counts, as it does there. Importing this module
needs lm-eval, and registers the model.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, cast

import lm_eval.models  # noqa: F401  (lm-eval's own models, which it registers only where none is known)
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from yoco_megatron.evaluation.backends.load import open_backend
from yoco_megatron.evaluation.model_files import look
from yoco_megatron.evaluation.requests import Generate, Score
from yoco_megatron.utils.errors import require

NEW_TOKENS = 256  # lm-eval's default of max_gen_toks


@register_model("yoco")
class YocoLM(TemplateLM):
    """Model arguments of lm-eval.

    Args:
        load: a run's --save, or the folder of an exported model.
        iteration: which training checkpoint; the latest by default.
        tokenizer: folder of one to use instead of the model's own.
        add_bos_token: as in the class `hf`: whether texts begin with the tokenizer's special tokens; None: as it says.
        tokens_per_batch: memory and speed only. batch_size, max_batch_size, device: lm-eval passes them; not used.
    Raises:
        ValueError: no model there, or no tokenizer.
    """

    def __init__(
        self,
        load: str,
        iteration: int | None = None,
        tokenizer: str | None = None,
        add_bos_token: bool | None = None,
        tokens_per_batch: int = 32768,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.add_bos_token = add_bos_token
        text = look(load, iteration, tokenizer).tokenizer
        self.tokenizer = text.wrapped
        self.answers = cast(Any, open_backend(load, iteration, text, token_budget=tokens_per_batch))
        self.max_length: int = self.answers.max_length
        self.answers.vocab_size = None  # padding of the vocabulary counts
        self.answers.max_length += 1  # a sequence's last token is predicted, and no position of the model

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that spells its beginning gets no other one."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self.tokenizer.decode([self.prefix_token_id])):
            special = False
        return self.tokenizer.encode(string, **({} if special is None else {"add_special_tokens": special}))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Neighbours with one context, such as the choices of a document, share it."""
        cut = [self._cut(before, after) for _, before, after in requests]
        scores = [Score(before, tuple(after for _, after in same)) for before, same in groupby(cut, lambda one: one[0])]
        answers = self._tell(self.answers.score(scores), len(scores), "likelihoods", disable_tqdm)
        found = [(one.log_probability, one.is_greedy) for answer in answers for one in answer]
        for request, one in zip(requests, found):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], one)
        return found

    def _cut(self, before: list[int], after: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Without the beginning of what is too long."""
        require(
            0 < len(after) <= self.max_length,
            f"a continuation has {len(after)} tokens, and must have from 1 to the model's {self.max_length}",
        )
        return tuple(before[-(self.max_length + 1 - len(after)) :]), tuple(after)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in pieces of the model's length, each predicted from one token on."""
        pieces: list[tuple[Any, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(window)) for window in windows]
            pieces += own
            counts.append(len(own))
        values = iter(self._loglikelihood_tokens(pieces, disable_tqdm))
        return [sum(next(values)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut at the first of the texts that end them.

        Raises:
            ValueError: sampling is asked for, or more new tokens than the model has.
        """
        asked = []
        for context, settings in (request.args for request in requests):
            require(
                not (settings.get("do_sample") and settings.get("temperature", 1.0)),
                f"{settings} asks for samples; this model decodes greedily: set do_sample to false",
            )
            new = int(settings.get("max_gen_toks", NEW_TOKENS))
            room = self.max_length - new
            require(room > 0, f"max_gen_toks {new}: the model's sequences end at {self.max_length}")
            asked.append(Generate(tuple(self.tok_encode(context)[-room:]), new, frozenset({self.eot_token_id})))
        answers = self._tell(self.answers.generate(asked), len(asked), "continuations", disable_tqdm)
        found = []
        for request, ids in zip(requests, answers):
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            until = request.args[1].get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                text = text.split(stop)[0] if stop else text
            self.cache_hook.add_partial("generate_until", request.args, text)
            found.append(text)
        return found

    def _tell(self, answers: Iterator[Any], total: int, what: str, silent: bool) -> Iterator[Any]:
        return iter(tqdm(answers, total=total, desc=what, disable=silent or None))
