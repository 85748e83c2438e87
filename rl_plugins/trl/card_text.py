"""Model cards: which method has trained a model, whom to cite, and how to load the files beside the weights."""

from dataclasses import dataclass
from pathlib import Path

from rl_plugins import __version__
from rl_plugins.moe.config import BalancingConfig
from rl_plugins.nn.mtp_heads import MTPHeads
from rl_plugins.papers import PAPERS

CARD = "README.md"
TRAINING = "\n## Training procedure\n"
VERSIONS = "\n### Framework versions\n"


@dataclass(frozen=True)
class Method:
    """Description of a training, for the card of its model.

    Args:
        name: Name for readers.
        own_papers: Keys of the papers that introduced it; empty if the method has no paper of its own.
        parts: Sentences on other parts of the training, which end with a full stop, each with its papers' keys.
        code: Headings, each with Python that loads files beside the weights; `{folder}` stands for the model's folder.
    """

    name: str
    own_papers: tuple[str, ...] = ()
    parts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    code: tuple[tuple[str, str], ...] = ()

    @property
    def papers(self) -> tuple[str, ...]:
        """Keys of all papers, each once."""
        return tuple(dict.fromkeys([*self.own_papers, *(key for _, keys in self.parts for key in keys)]))


HEADS_CODE = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_plugins.nn import load_mtp_heads

folder = {folder}
model = AutoModelForCausalLM.from_pretrained(folder)
heads = load_mtp_heads(model, folder)  # attaches them to the model

tokens = AutoTokenizer.from_pretrained(folder)("1 + 1 =", return_tensors="pt").input_ids
with torch.no_grad(), heads.running(lambda states: states) as run:
    model(tokens)
values = run.values  # (1, tokens, heads)
"""
VALUE_MODEL_CODE = """\
import torch
from transformers import AutoTokenizer

from rl_plugins.nn import ValueModel

folder = {folder}
value_model = ValueModel.from_pretrained(f"{{folder}}/value_model")

tokens = AutoTokenizer.from_pretrained(folder)("1 + 1 =", return_tensors="pt").input_ids
with torch.no_grad():
    values = value_model(tokens)  # (1, tokens)
"""
BIAS_CODE = """\
from transformers import AutoModelForCausalLM

from rl_plugins.moe import load_selection_bias

folder = {folder}
model = AutoModelForCausalLM.from_pretrained(folder)
load_selection_bias(model, folder)  # routes as in training
"""


def heads_loading(*, with_values: bool) -> tuple[str, str]:
    """Return a heading and the code that loads heads.

    Args:
        with_values: Whether the heads have learnt values.
    """
    if with_values:
        return "Loading the heads and reading their values", HEADS_CODE
    loading = HEADS_CODE[: HEADS_CODE.index("\ntokens")]
    return "Loading the heads", loading.replace("import torch\n", "").replace(", AutoTokenizer", "")


def head_papers(heads: MTPHeads) -> tuple[str, tuple[str, ...]]:
    """Return a sentence on the kind of heads that a model has, with the papers of that kind."""
    kind, number = heads.config.head_type, heads.config.num_heads
    papers = ("deepseek_v3",) if kind == "sequential" else ("mtp",)
    return f"It has {number} {kind} multi-token-prediction head{'s' if number > 1 else ''}.", papers


def balancing_parts(config: BalancingConfig) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return sentences on how experts were balanced, each with its papers."""
    parts: list[tuple[str, tuple[str, ...]]] = []
    if config.rate > 0.0:
        papers = ("quantile",) if config.rule == "quantile" else ("loss_free",)
        parts.append(
            (f"Experts were balanced by a selection bias (rate={config.rate:g}, rule={config.rule!r}).", papers)
        )
    if config.aux_loss_coef > 0.0:
        papers = ("deepseek_v3",) if config.aux_loss_type == "sequence" else ("switch",)
        wider = ("global_batch",) if config.batch == "global" else ()
        kind = f"aux_loss_coef={config.aux_loss_coef:g}, aux_loss_type={config.aux_loss_type!r}"
        parts.append((f"Experts were balanced by an auxiliary loss ({kind}, batch={config.batch!r}).", papers + wider))
    if config.z_loss_coef > 0.0:
        parts.append((f"A z-loss kept the router's logits small (z_loss_coef={config.z_loss_coef:g}).", ("st_moe",)))
    return tuple(parts)


def complete_card(path: Path, method: Method, *, trained_by: str, hub_id: str | None = None) -> None:
    """Add to a model card the parts that the host's template lacks.

    Args:
        path: Card that the host has written, in the folder of the model.
        method: Method by which the model was trained.
        trained_by: Name of the trainer's class.
        hub_id: Id of the model on the hub, if it goes there.
    """
    text = path.read_text(encoding="utf-8")
    # The host's template writes None for a model that is on no hub.
    text = text.replace("a fine-tuned version of [None](https://huggingface.co/None)", "a fine-tuned model")
    text = text.replace('model="None"', f'model="{path.parent.name}"')
    text = _insert(text, TRAINING, _loading(method, path.parent.name, hub_id))
    text = _insert(text, VERSIONS, _procedure(method, trained_by))
    path.write_text(text.rstrip() + "\n" + _citations(text, method), encoding="utf-8")


def _insert(text: str, before: str, addition: str) -> str:
    if addition in text:
        return text
    place = text.find(before)
    return f"{text.rstrip()}\n\n{addition}" if place < 0 else f"{text[:place]}\n{addition}{text[place:]}"


def _loading(method: Method, folder: str, hub_id: str | None) -> str:
    source = f'"{folder}"  # where this file is' if hub_id is None else f'snapshot_download("{hub_id}")'
    blocks = []
    for heading, code in method.code:
        lines = code.format(folder=source)
        if hub_id is not None:
            lines = f"from huggingface_hub import snapshot_download\n{lines}"
        blocks.append(f"## {heading}\n\nThis needs `pip install rl-plugins`.\n\n```python\n{lines}```\n")
    return "\n".join(blocks)


def _procedure(method: Method, trained_by: str) -> str:
    lines = [f"`{trained_by}` has trained it, with rl_plugins {__version__}."]
    for sentence, keys in method.parts:
        sources = f" See {' and '.join(PAPERS[key].link for key in keys)}." if keys else ""
        lines.append(sentence + sources)
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _citations(text: str, method: Method) -> str:
    entries = [PAPERS[key].bibtex(key) for key in method.papers]
    missing = [entry for entry in entries if entry not in text]
    if not missing:
        return ""
    return "\nCite what its parts come from as:\n\n```bibtex\n" + "\n\n".join(missing) + "\n```\n"


def host_paper(method: Method) -> dict[str, str]:
    """Make the entry for a method's own papers that TRL's template shows."""
    if not method.own_papers:
        return {}
    first = PAPERS[method.own_papers[0]]
    entry = {"citation": "\n\n".join(PAPERS[key].bibtex(key) for key in method.own_papers)}
    return entry if first.arxiv is None else {**entry, "title": first.title, "id": first.arxiv}
