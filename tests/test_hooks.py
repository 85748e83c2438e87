"""The table of `rl_plugins/hooks.py`: it fits what is installed, it lists all that we lean on, and its check says what
has changed."""

import ast
import inspect
import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from importlib import import_module, reload
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import torch
import transformers
import trl
from lightning.pytorch import LightningModule
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from transformers import Cache, DynamicCache, GenerationConfig
from trl import GRPOTrainer, SFTTrainer

import rl_plugins.lightning
import rl_plugins.trl
from rl_plugins import hooks
from rl_plugins.hooks import (
    HOOKS,
    RELEASED_HEADS,
    SEQUENTIAL_HEADS,
    SPECULATIVE,
    TESTED,
    TURN_OFF,
    Hook,
    changed_hooks,
    require_hooks,
)
from rl_plugins.lightning import PromptDataModule
from rl_plugins.nn import attach_mtp_heads
from rl_plugins.nn.cache_name import cache_name
from rl_plugins.rollouts import speculative
from rl_plugins.trl import MTPCriticTrainer

from .helpers.moe_models import make_moe_model

ROOT = Path(__file__).parent.parent
ROWS = [(user, hook) for user, rows in HOOKS.items() for hook in rows]
DOCUMENTED = {
    "lightning.pytorch": ("callbacks", "cli", "strategies", "utilities"),
    "lightning.fabric": ("utilities",),
    "transformers": ("generation", "utils"),
    "accelerate": ("utils",),
}
"""Packages that libraries document, beside their top levels."""


@pytest.fixture(autouse=True)
def fresh_checks() -> Iterator[None]:
    """Checks remember what they have found; here the libraries change in between."""
    require_hooks.cache_clear()
    yield
    require_hooks.cache_clear()


# The table fits, and is complete


@pytest.mark.parametrize(("user", "hook"), ROWS, ids=[f"{user}-{hook.target}" for user, hook in ROWS])
def test_what_is_installed_fits(user: str, hook: Hook) -> None:
    assert list(changed_hooks((hook,))) == []


def sources(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text())


@pytest.mark.slow
def test_every_import_from_inside_a_library_is_in_the_table() -> None:
    targets = [hook.target for _, hook in ROWS]
    documented = {f"{library}.{name}" for library, names in DOCUMENTED.items() for name in names}
    found = set()
    for path, tree in sources("rl_plugins"):
        for node in ast.walk(tree):
            module = (isinstance(node, ast.ImportFrom) and node.module) or ""
            library = module.partition(".")[0]
            if library not in TESTED or module in documented | {library, "lightning.pytorch"} or library == "torch":
                continue
            for alias in node.names:  # type: ignore[union-attr]
                found.add(alias.name)
                name = f"{module}.{alias.name}"
                assert any(f"{target}.".startswith(f"{name}.") for target in targets), f"{path.name}: {name}"
    assert {"MtpModel", "get_config_model_id", "TrainerFn"} <= found


def test_every_private_name_of_a_trainer_that_we_use_is_in_the_table() -> None:
    listed = {hook.target.rpartition(".")[2] for _, hook in ROWS}
    used = {
        node.attr
        for _, tree in sources("rl_plugins/trl")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    }
    hosts = [
        name
        for name in used
        if any(not list(changed_hooks((Hook(f"trl.{host}.{name}"),))) for host in ("GRPOTrainer", "SFTTrainer"))
    ]
    assert {"_step", "_compute_loss", "_signature_columns"} <= set(hosts)
    assert set(hosts) <= listed


@pytest.mark.parametrize("trainer", ["GRPOVariantTrainer", "MTPCriticTrainer", "MTPSFTTrainer", "PPOTrainer"])
def test_our_overrides_take_the_parameters_of_the_table(trainer: str) -> None:
    ours = getattr(rl_plugins.trl, trainer)
    host = SFTTrainer if issubclass(ours, SFTTrainer) else GRPOTrainer
    compared = 0
    for hook in HOOKS["rl_plugins.trl"]:
        owner, _, name = hook.target.rpartition(".")
        if hook.parameters == hooks.PRESENT or owner not in (f"trl.{host.__name__}", "transformers.Trainer"):
            continue
        for cls in ours.__mro__[: ours.__mro__.index(host)]:
            if name in vars(cls):
                given = list(inspect.signature(vars(cls)[name]).parameters.values())[1:]
                names = [param.name for param in given if param.kind is param.POSITIONAL_OR_KEYWORD]
                assert hook.parameters.split(", ")[: len(names)] == names, cls
                compared += bool(names)
    assert compared >= 5


def test_the_tested_releases_are_those_of_the_constraints() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pins[name] for name in TESTED} == TESTED
    assert {hook.target.partition(".")[0] for _, hook in ROWS} <= set(TESTED)
    assert set(TURN_OFF) <= set(HOOKS)


# What they do


def test_private_attributes_of_a_live_trainer(
    tiny_model: Callable[..., Any],
    tokenizer: Any,
    dataset: Any,
    reward: Any,
    critic_args: Callable[..., Any],
    tmp_path: Path,
) -> None:
    trainer = MTPCriticTrainer(tiny_model(), reward, critic_args(tmp_path), dataset, processing_class=tokenizer)
    assert trainer._step == 0 and trainer._buffered_inputs is None
    assert set(trainer._metrics) == {"train", "eval"} and isinstance(trainer._metrics["train"], defaultdict)
    assert trainer._metrics["train"]["new"] == []
    assert isinstance(trainer._logs["advantages"], deque) and isinstance(trainer._logs["extra"]["value"], deque)
    assert trainer._entropy_bonus_enabled is False and trainer._tokenizer.pad_token_id == tokenizer.pad_token_id
    assert callable(trainer.model.forward) and trainer.temperature == 1.0 and trainer.beta == 0.0


def test_what_generate_hands_to_a_decoding_method(tiny_model: Callable[..., Any]) -> None:
    model, prompt = tiny_model(), torch.tensor([[3, 4, 5]])
    handed: dict[str, Any] = {}

    def decode(model: Any, input_ids: Any, **kwargs: Any) -> Any:
        handed.update(kwargs)
        return input_ids

    model.generate(prompt, max_new_tokens=2, custom_generate=decode)
    assert isinstance(handed[cache_name()], Cache) and handed[cache_name()].get_seq_length() == 0
    assert {"past_key_values", "cache"} & set(handed) == {cache_name()}
    assert {"logits_processor", "stopping_criteria", "generation_config", "attention_mask"} <= set(handed)
    inputs = model.prepare_inputs_for_generation(
        prompt, attention_mask=None, is_first_iteration=True, **{cache_name(): handed[cache_name()]}
    )
    assert inputs[cache_name()] is handed[cache_name()] and inputs["input_ids"].tolist() == [[3, 4, 5]]
    output = model(**inputs)
    assert output[cache_name()].get_seq_length() == 3
    filled = DynamicCache(config=model.config)
    model(prompt[:, :2], **{cache_name(): filled})
    later = model(prompt[:, 2:], **{cache_name(): filled}).logits
    torch.testing.assert_close(later[:, -1], output.logits[:, -1])


def test_what_sequential_heads_lean_on(tiny_model: Callable[..., Any]) -> None:
    assert isinstance(transformers.DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected, list)
    model = tiny_model()
    model.gradient_checkpointing_enable()
    assert callable(model.model.layers[0]._gradient_checkpointing_func)


def test_what_accumulation_leans_on() -> None:
    loop = lightning.pytorch.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop
    assert loop._data_fetcher is None and not inspect.signature(loop._should_accumulate).parameters
    assert loop.epoch_loop.batch_progress.current.ready == 0
    fetcher = _PrefetchDataFetcher()
    fetcher.setup(CombinedLoader(iter([1, 2]), "max_size_cycle"))
    assert iter(fetcher).batches == [(1, 0, 0)] and next(fetcher.iterator) == (2, 1, 0)


def test_what_lightning_modules_lean_on() -> None:
    assert LightningModule()._trainer is None
    rows = [{"prompt": "1"}]
    assert is_overridden("val_dataloader", PromptDataModule(rows, rows))
    assert not is_overridden("val_dataloader", PromptDataModule(rows))


# The check


class Library:
    """A library whose names are hooks."""

    constant = 1

    def __init__(self) -> None:
        self.stored = 0

    def step(self, model: Any, inputs: Any) -> None:
        self.mentioned = model

    def with_optional(self, model: Any, inputs: Any, extra: Any = None, *, other: int = 1) -> None: ...

    def with_required(self, model: Any, inputs: Any, extra: Any) -> None: ...

    def with_required_keyword(self, model: Any, inputs: Any, *, extra: Any) -> None: ...

    def renamed(self, model: Any, batch: Any) -> None: ...

    def swapped(self, inputs: Any, model: Any) -> None: ...

    def by_keyword_only(self, model: Any, *, inputs: Any) -> None: ...

    def open_ended(self, model: Any, **kwargs: Any) -> None: ...

    @staticmethod
    def static(model: Any, inputs: Any) -> None: ...

    @classmethod
    def of_class(cls, model: Any, inputs: Any) -> None: ...


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], str]:
    """What the check says of one row about a library; nothing if it fits."""
    library = ModuleType("library")
    library.__dict__.update(__version__="9.9.9", Library=Library, __path__=[str(tmp_path)])
    (tmp_path / "broken.py").write_text("import nowhere")
    monkeypatch.setitem(sys.modules, "library", library)
    monkeypatch.setitem(TESTED, "library", "1.2.3")

    def run(target: str, parameters: str) -> str:
        monkeypatch.setitem(HOOKS, "a feature", (Hook("library.Library"), Hook(f"library.{target}", parameters)))
        require_hooks.cache_clear()
        try:
            require_hooks("a feature")
        except ImportError as error:
            return str(error)
        return ""

    return run


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("step", "model, inputs"),
        ("step", "*, inputs, model"),
        ("step", "model, *, inputs"),
        ("step", "model, cache|inputs"),
        ("step", "inputs|model, *, cache|inputs"),
        ("step", hooks.PRESENT),
        ("with_optional", "model, inputs"),
        ("with_optional", "model, inputs, *, other"),
        ("with_required", "model, inputs, ..."),
        ("with_required_keyword", "model, inputs, *, extra"),
        ("by_keyword_only", "model, *, inputs"),
        ("open_ended", "model, *, inputs, anything"),
        ("static", "model, inputs"),
        ("of_class", "model, inputs"),
        ("stored", hooks.PRESENT),
        ("mentioned", hooks.PRESENT),
        ("__init__", ""),
    ],
)
def test_hooks_that_fit(name: str, parameters: str, check: Callable[[str, str], str]) -> None:
    assert check(f"Library.{name}", parameters) == ""


@pytest.mark.parametrize(
    ("target", "parameters", "change"),
    [
        ("Library.removed", "model", "is gone"),
        ("Library.removed", hooks.PRESENT, "is gone"),
        ("Library.stored", "model", "is gone"),  # there, but no function
        ("Library.constant", "model", "is no function any more"),
        ("Removed", hooks.PRESENT, "is gone"),
        ("broken.function", hooks.PRESENT, "cannot be imported (No module named 'nowhere')"),
        ("Removed.step", "model", "is gone"),
        ("removed.module.function", hooks.PRESENT, "is gone"),
        (
            "Library.renamed",
            "model, inputs",
            "has no parameter `inputs` in place 2: it takes (model: Any, batch: Any)",
        ),
        ("Library.renamed", "model, *, inputs", "has no parameter `inputs`: it takes"),
        ("Library.renamed", "model, cache|inputs", "has no parameter `cache|inputs` in place 2"),
        ("Library.swapped", "model, inputs", "has no parameter `model` in place 1"),
        ("Library.by_keyword_only", "model, inputs", "has no parameter `inputs` in place 2"),
        ("Library.step", "model, inputs, more", "has no parameter `more` in place 3"),
        ("Library.step", "model", "has a new parameter `inputs`, which must be given"),
        ("Library.with_required", "model, inputs", "has a new parameter `extra`, which must be given"),
        ("Library.with_required_keyword", "model, inputs", "has a new parameter `extra`, which must be given"),
        ("Library.of_class", "cls, model", "has no parameter `cls` in place 1"),
    ],
)
def test_hooks_that_have_changed(target: str, parameters: str, change: str, check: Callable[[str, str], str]) -> None:
    message = check(target, parameters)
    assert message.startswith(f"a feature cannot run with library 9.9.9: library.{target} {change}")
    assert message.endswith('Install what was tested (pip install "library==1.2.3") or a newer rl_plugins.')


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HOOKS, "a feature", (Hook("nowhere.function"),))
    monkeypatch.setitem(TESTED, "nowhere", "1.2.3")
    with pytest.raises(
        ImportError, match="^a feature needs nowhere, which is not installed. Run: pip install nowhere==1.2.3"
    ):
        require_hooks("a feature")


def test_a_trl_that_has_changed_is_named_when_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    reload(rl_plugins.trl)  # whatever its number, it fits
    require_hooks.cache_clear()

    def compute(self: Any, model: Any, inputs: Any, window: Any) -> None: ...

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute)
    monkeypatch.delattr(trl.trainer.utils, "get_config_model_id")
    with pytest.raises(ImportError) as caught:
        reload(rl_plugins.trl)
    message = str(caught.value)
    assert message.startswith(
        "rl_plugins.trl cannot run with trl 1.99.0: trl.GRPOTrainer._compute_loss has a new parameter"
    )
    assert "`window`" in message and "trl.trainer.utils.get_config_model_id is gone" in message
    assert f'pip install "trl=={TESTED["trl"]}"' in message


def test_a_feature_whose_hook_has_changed_says_so_when_it_is_used(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(GenerationConfig, "get_generation_mode")
    monkeypatch.delattr(transformers.modeling_layers, "MtpModel")
    reload(rl_plugins.trl)
    reload(rl_plugins.lightning)
    monkeypatch.delitem(sys.modules, "rl_plugins.rollouts.speculative.decoder", raising=False)
    monkeypatch.delattr(speculative, "decoder", raising=False)
    message = (
        f"{SPECULATIVE} cannot run with transformers .*GenerationConfig.get_generation_mode is gone.*speculative=False"
    )
    with pytest.raises(ImportError, match=message):
        getattr(import_module("rl_plugins.rollouts"), "SpeculativeDecoder")  # noqa: B009
    model, way_out = make_moe_model("deepseek_v3"), r"or use parallel heads \(mtp_head_type='parallel'\)"
    message = f"{RELEASED_HEADS} cannot run with transformers .*MtpModel.from_pretrained is gone.*{way_out}"
    with pytest.raises(ImportError, match=message):
        attach_mtp_heads(model, head_type="sequential")
    attach_mtp_heads(tiny_model(), head_type="sequential")  # whose architecture is never released with them
    monkeypatch.delattr(transformers.masking_utils, "create_causal_mask")
    require_hooks.cache_clear()
    message = f"{SEQUENTIAL_HEADS} cannot run with transformers .*create_causal_mask is gone.*{way_out}"
    with pytest.raises(ImportError, match=message):
        attach_mtp_heads(tiny_model(), head_type="sequential")
    attach_mtp_heads(model)


@pytest.mark.slow
def test_packages_are_imported_without_the_hooks_and_the_weight_of_their_features(tmp_path: Path) -> None:
    script = tmp_path / "imports.py"
    script.write_text(
        "import sys, transformers.cache_utils, transformers.generation.logits_process, transformers.masking_utils\n"
        "import transformers.modeling_layers, transformers.core_model_loading\n"
        "import trl, lightning.pytorch\n"
        "trl.GRPOTrainer, trl.SFTTrainer, transformers.Trainer, transformers.DeepseekV3ForCausalLM\n"
        "del transformers.cache_utils.DummyLayer, transformers.generation.logits_process.TopHLogitsWarper\n"
        "del transformers.masking_utils.create_causal_mask, transformers.core_model_loading.revert_weight_conversion\n"
        "del transformers.modeling_layers.MtpLayer, transformers.modeling_layers.MtpModel\n"
        "del trl.GRPOTrainer.get_high_entropy_mask\n"
        "before = set(sys.modules)\n"
        "import rl_plugins.trl, rl_plugins.lightning\n"
        "new = {name for name in set(sys.modules) - before if not name.startswith('rl_plugins')}\n"
        "print(sorted(new & {'vllm', 'trl.scripts.grpo', 'lightning.pytorch.cli', 'deepspeed'}))\n"
        "from rl_plugins.rollouts import SpeculativeDecoder\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.splitlines()[-1] == "[]"
    assert "ImportError: speculative decoding cannot run with transformers" in run.stderr
    assert "DummyLayer is gone" in run.stderr and "TopHLogitsWarper is gone" in run.stderr
