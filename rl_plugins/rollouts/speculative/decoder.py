"""Decoding method for `generate` that samples speculatively: heads draft, the model verifies, in batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rl_plugins.hooks import SPECULATIVE, require_hooks

require_hooks(SPECULATIVE)

from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerationMode

from rl_plugins.nn.attachment import base_model_of, has_soft_prompt
from rl_plugins.rollouts.speculative.cache import TURN_OFF, rollback_cache
from rl_plugins.rollouts.speculative.decoding import Decoding, check_positions
from rl_plugins.rollouts.speculative.draft_length import DraftLength
from rl_plugins.rollouts.speculative.draft_statistics import SpeculativeOutput
from rl_plugins.rollouts.speculative.drafters import Drafter, make_drafter
from rl_plugins.rollouts.speculative.score_processing import ScoreProcessor
from rl_plugins.rollouts.speculative.stopping import Stopping
from rl_plugins.rollouts.values import ValueRecord


class SpeculativeDecoder:
    """Decoding method for `model.generate(..., custom_generate=SpeculativeDecoder())`: the tokens that `generate`
    would sample, in fewer forward passes.

    In each step the heads draft up to K tokens, and one forward pass of the model scores all of them. Every row keeps
    its drafts before the first rejected one, and one more token from what is left of the model's distribution
    (Leviathan et al., 2211.17192, algorithm 1). The completions have exactly the distribution of plain sampling, with
    all of `generate`'s options that change scores (temperature, top-k, top-p, min-p, repetition penalty, ...). Greedy
    decoding gives the same tokens. Floating-point sums differ in the last digits, as between batch sizes.

    Rows of one batch may accept different numbers of tokens; rows that have ended are left out of later passes.
    `generate` does not give decoding methods its `tokenizer`, and so refuses `stop_strings` here: pass
    `stopping_criteria=StoppingCriteriaList([StopStringCriteria(tokenizer, strings)])`.

    Args:
        num_draft_tokens: Most drafts per step; the number of heads by default. Each step has as many drafts as save
            time, down to none.
        draft_cost: Time that one more draft costs, in units of a step without drafts; `None` measures it. With a
            number the same seed gives the same completions; 0 drafts `num_draft_tokens` in every step. See
            [`DraftLength`].
        listener: Called with the number of tokens of the longest completion after each step.

    Attributes:
        recorder: A [`ValueRecord`] to which the next call gives the state of every new token; `None` for none. Each
            call sets it back to `None`, so that a recorder holds the values of one batch.
        last: Output of the newest call.

    Raises:
        ValueError: If `num_draft_tokens` is below 1 or `draft_cost` below 0; when called, if the model has no heads
            or fewer than `num_draft_tokens`, or its cache cannot take tokens back row by row.
    """

    def __init__(
        self,
        num_draft_tokens: int | None = None,
        *,
        draft_cost: float | None = None,
        listener: Callable[[int], None] | None = None,
    ) -> None:
        if num_draft_tokens is not None and num_draft_tokens < 1:
            raise ValueError(
                f"num_draft_tokens must be at least 1, got {num_draft_tokens}. To draft nothing, generate without "
                "speculation."
            )
        if draft_cost is not None and draft_cost < 0.0:
            raise ValueError(f"draft_cost must be at least 0, got {draft_cost}.")
        self.num_draft_tokens, self.draft_cost, self.listener = num_draft_tokens, draft_cost, listener
        self.recorder: ValueRecord | None = None
        self.draft_length: DraftLength | None = None
        self.last: SpeculativeOutput | None = None

    def __call__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | SpeculativeOutput:
        """Complete the prompts (B, P); `generate` calls this after its preparations."""
        drafter = make_drafter(model)
        self._prepare(drafter)
        assert self.draft_length is not None
        _check_options(generation_config, model_kwargs)
        recorder, self.recorder = self.recorder, None
        decoding = Decoding(
            model,
            drafter,
            self.draft_length,
            input_ids,
            ScoreProcessor(logits_processor),
            Stopping(stopping_criteria),
            generation_config,
            recorder,
            model_kwargs,
        )
        self.last = decoding.run(self.listener)
        if generation_config.return_dict_in_generate:
            return self.last
        assert self.last.sequences is not None
        return self.last.sequences

    def check(self, model: nn.Module) -> None:
        """Check that a model can be decoded with these settings, before any work starts.

        Raises:
            ValueError: If it cannot, for the reasons that are listed for the class.
        """
        base = base_model_of(model)
        if has_soft_prompt(model):
            raise ValueError(
                "Speculative decoding does not know the places that PEFT's soft prompts take before the prompt. Train "
                f"a LoRA adapter instead. {TURN_OFF}"
            )
        self._prepare(make_drafter(model))
        check_positions(base)
        rollback_cache(DynamicCache(config=base.config), getattr(base.config.get_text_config(), "layer_types", None))

    def state_dict(self) -> dict[str, Any]:
        """Return the running acceptance rates, so that a resumed run drafts as many tokens as an uninterrupted one."""
        return {} if self.draft_length is None else self.draft_length.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave; call `check` first."""
        if state:
            assert self.draft_length is not None
            self.draft_length.load_state_dict(state)

    def _prepare(self, drafter: Drafter) -> None:
        """Make `draft_length` for this number of heads, or keep the one of the calls before."""
        limit = self.num_draft_tokens or drafter.max_drafts
        if limit > drafter.max_drafts:
            raise ValueError(
                f"num_draft_tokens={limit}, but the model has {drafter.max_drafts} heads, and each drafts one token. "
                f"Set num_draft_tokens to at most {drafter.max_drafts}, or train more heads."
            )
        if self.draft_length is None or self.draft_length.max_drafts != limit:
            self.draft_length = DraftLength(limit, self.draft_cost)


def _check_options(config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    if model_kwargs.get("inputs_embeds") is not None:
        raise ValueError("Speculative decoding needs the prompts as input_ids: inputs_embeds is not supported.")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"Speculative decoding samples or decodes greedily, but these options ask for {mode.value}. Leave them "
            "out, or generate without speculation."
        )
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise ValueError(
                f"{name}=True is not supported by speculative decoding, which scores several tokens at once; "
                "log_probs are in its output. Leave it out, or generate without speculation."
            )


@contextmanager
def speculating(model: nn.Module, decoder: SpeculativeDecoder) -> Iterator[None]:
    """Make every `generate` of a model inside the block decode speculatively, whoever calls it.

    Args:
        model: Causal LM, or a PEFT model around one.
        decoder: Decoding method that every call uses.
    """
    base: Any = base_model_of(model)
    outer = base.__dict__.get("generate")
    base.generate = partial(base.generate, custom_generate=decoder)
    try:
        yield
    finally:
        if outer is None:
            del base.generate
        else:
            base.generate = outer
