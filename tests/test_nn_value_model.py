"""`ValueModel` beside a tiny policy: where it comes from, that the policy does not notice it, and its file."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2Model, Qwen3ForSequenceClassification

from rl_plugins.functional.alignment import completion_states
from rl_plugins.nn import ValueModel
from rl_plugins.nn.value_model import HEAD_NAME
from rl_plugins.trl import PPOConfig

TinyModel = Callable[..., Any]

IDS = torch.tensor([[0, 0, 5, 9, 4, 12], [3, 8, 5, 13, 6, 2], [0, 7, 2, 2, 11, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0]])


def randomised(model: ValueModel, seed: int = 1) -> ValueModel:
    """The same with a head that tells states apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.head.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def options(tmp_path: Path) -> PPOConfig:
    return PPOConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none")


def make_value_model(source: Any, policy: Any, options: PPOConfig) -> ValueModel:
    """As `PPOTrainer` makes it."""
    return ValueModel.prepare(
        source,
        policy,
        policy_init_kwargs=options.model_init_kwargs,
        init_kwargs=options.value_model_init_kwargs,
    )


def assert_same_weights(left: Any, right: Any) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys() and len(ours) > 5
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def memory(model: Any) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


# Where it comes from


def test_default_is_a_copy_of_the_policys_trunk(tiny_model: TinyModel, options: PPOConfig) -> None:
    policy = tiny_model()
    policy.model.layers[0].requires_grad_(False)
    critic = make_value_model(None, policy, options)
    assert_same_weights(critic.trunk, policy.model)
    assert memory(critic).isdisjoint(memory(policy))
    critic.attach(policy)
    assert all(p.requires_grad for p in critic.parameters())
    assert not critic(IDS, MASK).any() and critic(IDS, MASK).dtype == torch.float32


def sources(tiny_model: TinyModel, root: Path) -> dict[str, tuple[Any, Any]]:
    """What a user may give, and the trunk that it must become."""
    same, small = tiny_model(seed=7), tiny_model(seed=8, num_hidden_layers=1, hidden_size=16)
    ranker = Qwen3ForSequenceClassification(tiny_model(num_labels=1).config)
    saved = randomised(ValueModel(tiny_model(seed=9).model))
    for name, model in {"same": same, "small": small, "ranker": ranker, "saved": saved}.items():
        model.save_pretrained(root / name)
    return {
        "path": (str(root / "same"), same.model),
        "smaller": (str(root / "small"), small.model),
        "reward model": (str(root / "ranker"), ranker.model),
        "value model folder": (str(root / "saved"), saved.trunk),
        "language model": (same, same.model),
        "reward model object": (ranker, ranker.model),
        "trunk": (small.model, small.model),
        "value model": (saved, saved.trunk),
    }


@pytest.mark.parametrize(
    "name",
    [
        "path",
        "smaller",
        "reward model",
        "value model folder",
        "language model",
        "reward model object",
        "trunk",
        "value model",
    ],
)
def test_sources(tiny_model: TinyModel, options: PPOConfig, tmp_path: Path, name: str) -> None:
    source, trunk = sources(tiny_model, tmp_path)[name]
    policy = tiny_model()
    logits = policy(IDS, attention_mask=MASK).logits
    critic = make_value_model(source, policy, options)
    assert_same_weights(critic.trunk, trunk)
    if isinstance(source, torch.nn.Module) and not isinstance(source, ValueModel):
        assert memory(critic).isdisjoint(memory(source)), "training the critic would change the user's model"
    critic.attach(policy)
    seen: list[Tensor] = []
    with critic.watching(seen.append):
        assert torch.equal(policy(IDS, attention_mask=MASK).logits, logits)
    assert seen[0].shape == IDS.shape
    assert seen[0].any().item() == name.startswith("value model"), "only a saved value model has a head"


def test_the_policys_folder_brings_its_value_model(tiny_model: TinyModel, options: PPOConfig, tmp_path: Path) -> None:
    policy, critic = tiny_model(), randomised(ValueModel(tiny_model(seed=4).model))
    policy.save_pretrained(tmp_path / "policy")
    assert_same_weights(make_value_model(None, str(tmp_path / "policy"), options).trunk, policy.model)
    critic.save_pretrained(tmp_path / "policy" / ValueModel.name)
    assert_same_weights(make_value_model(None, str(tmp_path / "policy"), options), critic)
    # What is asked for by name wins.
    tiny_model(seed=6).save_pretrained(tmp_path / "other")
    other = make_value_model(str(tmp_path / "other"), str(tmp_path / "policy"), options)
    assert_same_weights(other.trunk, tiny_model(seed=6).model)


@pytest.fixture
def hub(tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache with `me/plain`, a language model, `me/critic`, a value model, and `me/both`, what PPO leaves."""

    def snapshot(name: str) -> Path:
        repo = tmp_path / "hub" / f"models--me--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("a" * 40)
        return repo / "snapshots" / ("a" * 40)

    tiny_model(seed=3).save_pretrained(snapshot("plain"))
    randomised(ValueModel(tiny_model(seed=4).model)).save_pretrained(snapshot("critic"))
    both = snapshot("both")
    tiny_model(seed=3).save_pretrained(both)
    randomised(ValueModel(tiny_model(seed=4).model)).save_pretrained(both / ValueModel.name)
    yield tmp_path / "hub"


def test_hub_ids(tiny_model: TinyModel, tmp_path: Path, hub: Path) -> None:
    options = PPOConfig(
        str(tmp_path / "run"), use_cpu=True, bf16=False, value_model_init_kwargs={"cache_dir": str(hub)}
    )
    saved = randomised(ValueModel(tiny_model(seed=4).model))
    plain = make_value_model("me/plain", tiny_model(), options)
    assert_same_weights(plain.trunk, tiny_model(seed=3).model)
    assert not plain.head.weight.any()
    assert_same_weights(make_value_model("me/critic", tiny_model(), options), saved)
    # As from a folder: a policy's own value model goes on.
    assert_same_weights(make_value_model(None, "me/both", options), saved)
    assert_same_weights(make_value_model(None, "me/plain", options).trunk, tiny_model(seed=3).model)


def test_what_is_no_model_is_refused(tiny_model: TinyModel, options: PPOConfig) -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="from NoneType for a policy of PeftModel.* Give value_model a path"):
        make_value_model(None, adapted, options)
    with pytest.raises(TypeError, match="Cannot make a value model from Linear for a policy of Qwen3ForCausalLM"):
        make_value_model(torch.nn.Linear(2, 2), tiny_model(), options)


def test_dtype_of_the_checkpoint(tiny_model: TinyModel, tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    config = PPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    critic = make_value_model(None, str(tmp_path / "model"), config)
    assert {p.dtype for p in critic.parameters()} == {torch.float32}  # as TRL loads the policy
    config.value_model_init_kwargs = {"dtype": "bfloat16"}
    critic = make_value_model(None, str(tmp_path / "model"), config)
    assert {p.dtype for p in critic.parameters()} == {torch.bfloat16}
    assert critic(IDS, MASK).dtype == torch.float32


def test_too_few_tokens(tiny_model: TinyModel) -> None:
    policy = tiny_model()
    with pytest.raises(ValueError, match="The value model knows 12 tokens and the policy 16.*policy's tokenizer"):
        ValueModel(tiny_model(vocab_size=12).model).attach(policy)
    assert ValueModel.of(policy) is None
    critic = ValueModel(tiny_model(vocab_size=20).model)  # padded embeddings
    critic.attach(policy)
    assert ValueModel.of(policy) is critic


def test_only_one(tiny_model: TinyModel) -> None:
    policy = tiny_model()
    ValueModel(tiny_model().model).attach(policy)
    with pytest.raises(ValueError, match=r"has `value_model` already. .* ValueModel.detach\(model\) to take it out"):
        ValueModel(tiny_model().model).attach(policy)


def test_detached_as_if_it_had_never_been_there(tiny_model: TinyModel) -> None:
    policy = tiny_model()
    before, ignored = policy.state_dict().keys(), set(policy._keys_to_ignore_on_save or ())
    critic = ValueModel(tiny_model().model)
    critic.attach(policy)
    assert ValueModel.detach(policy) is critic
    assert policy.state_dict().keys() == before and set(policy._keys_to_ignore_on_save or ()) == ignored
    seen: list[Tensor] = []
    with critic.watching(seen.append):
        policy(IDS, attention_mask=MASK)
    assert not seen
    with pytest.raises(ValueError, match="has no `value_model` to detach"):
        ValueModel.detach(policy)


# The policy does not notice


@pytest.mark.parametrize("adapted", [False, True])
def test_the_policy_is_bit_identical(tiny_model: TinyModel, tmp_path: Path, adapted: bool) -> None:
    def policy() -> Any:
        torch.manual_seed(0)
        model = tiny_model(initializer_range=0.2)
        return get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapted else model

    without, with_critic = policy(), policy()
    critic = randomised(ValueModel(tiny_model(seed=5).model))
    critic.attach(with_critic)

    def generate(model: Any) -> Tensor:
        torch.manual_seed(3)
        return model.generate(input_ids=IDS[:, :4], attention_mask=MASK[:, :4], max_new_tokens=8, do_sample=True)

    seen: list[Tensor] = []
    logits = without(IDS, attention_mask=MASK).logits
    assert torch.equal(with_critic(IDS, attention_mask=MASK).logits, logits)
    with critic.watching(seen.append):
        assert torch.equal(with_critic(IDS, attention_mask=MASK).logits, logits)
    assert torch.equal(generate(without), generate(with_critic))
    assert len(seen) == 1 and critic.observer is None
    without.save_pretrained(tmp_path / "without")
    with_critic.save_pretrained(tmp_path / "with")
    names = {path.name for path in (tmp_path / "without").iterdir()}
    assert names == {path.name for path in (tmp_path / "with").iterdir()}
    for name in names:
        if name != "README.md":
            assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name


def test_values_under_padding(tiny_model: TinyModel) -> None:
    """A row's values are those of the value model alone, at the positions that TRL feeds: counted from the padding."""
    policy, critic = tiny_model(), randomised(ValueModel(tiny_model(seed=5, initializer_range=0.2).model))
    critic.attach(policy)
    seen: list[Tensor] = []
    with critic.watching(seen.append), torch.no_grad():
        policy(input_ids=IDS, attention_mask=MASK)
        policy(IDS, attention_mask=MASK)
    assert torch.equal(*seen)
    for row in range(len(IDS)):
        real = MASK[row].bool()
        ids, positions = IDS[row : row + 1, real], torch.arange(IDS.shape[1])[None, real]
        with torch.no_grad():
            alone = critic.head(critic.trunk(input_ids=ids, position_ids=positions).last_hidden_state)
        torch.testing.assert_close(seen[0][row, real], alone[0], atol=1e-5, rtol=1e-5)
    states = completion_states(seen[0], 3)  # V(s_t) stands at the token before the one it leads to
    assert torch.equal(states, seen[0][:, 2:5]) and seen[0].std() > 0.1


def test_another_architecture(tiny_model: TinyModel) -> None:
    trunk = GPT2Model(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=32)).eval()
    policy, critic = tiny_model(), randomised(ValueModel(trunk))
    critic.attach(policy)
    seen: list[Tensor] = []
    with critic.watching(seen.append):
        policy(input_ids=IDS, attention_mask=MASK)
    assert torch.equal(seen[0], critic(IDS, MASK)) and seen[0].std() > 0.01


def test_observers_nest(tiny_model: TinyModel) -> None:
    policy, critic = tiny_model(), ValueModel(tiny_model().model)
    critic.attach(policy)
    outer: list[Tensor] = []
    inner: list[Tensor] = []
    with pytest.raises(KeyError), critic.watching(outer.append):
        with critic.watching(inner.append):
            policy(input_ids=IDS, attention_mask=MASK)
        policy(input_ids=IDS, attention_mask=MASK)
        raise KeyError
    policy(input_ids=IDS, attention_mask=MASK)
    assert (len(outer), len(inner)) == (1, 1)


# Its file


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tiny_model: TinyModel, tmp_path: Path, dtype: torch.dtype) -> None:
    randomised(ValueModel(tiny_model(seed=5).model)).save_pretrained(tmp_path / "first")
    critic = ValueModel.from_pretrained(tmp_path / "first", dtype=dtype)
    critic.save_pretrained(tmp_path / "critic")
    again = ValueModel.from_pretrained(tmp_path / "critic", dtype=dtype)
    assert_same_weights(again, critic)
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert torch.equal(again(IDS, MASK), critic(IDS, MASK)) and critic(IDS, MASK).std() > 0.1
    trunk, info = AutoModel.from_pretrained(tmp_path / "critic", dtype=dtype, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_weights(trunk, critic.trunk)
    assert_same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "critic", dtype=dtype).model, critic.trunk)
    assert set(load_file(tmp_path / "critic" / HEAD_NAME)) == {"rmsnorm_weight", "weight", "bias"}


def test_weights_from_elsewhere(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Where the module's own weights are shards, the ones that were gathered are written."""
    critic = randomised(ValueModel(tiny_model(seed=5).model))
    whole = {name: w.clone() for name, w in critic.state_dict().items()}
    shards = copy.deepcopy(critic)
    for p in shards.parameters():
        p.data = torch.empty(0)
    prefixed = {f"base_model.model.value_model.{name}": w for name, w in whole.items()}
    shards.save(tmp_path, prefixed | {"base_model.model.lm_head.weight": torch.zeros(2)})
    assert_same_weights(ValueModel.from_pretrained(tmp_path / "value_model"), critic)
    del prefixed["base_model.model.value_model.head.bias"]
    with pytest.raises(ValueError, match="not hold all weights of ValueModel; .* Missing are 1 of"):
        shards.save(tmp_path, prefixed)


def test_load(tiny_model: TinyModel, tmp_path: Path) -> None:
    saved, critic = randomised(ValueModel(tiny_model(seed=5).model)), ValueModel(tiny_model().model)
    with pytest.raises(FileNotFoundError, match="No value_model/value_head.safetensors .* saved with ValueModel"):
        critic.load(tmp_path)
    assert ValueModel.find(tmp_path) is None
    assert saved.save(tmp_path) == tmp_path / "value_model" / HEAD_NAME
    assert ValueModel.find(tmp_path) == str(tmp_path)
    parameters = list(critic.parameters())
    critic.load(tmp_path)
    assert_same_weights(critic, saved)
    assert all(new is old for new, old in zip(critic.parameters(), parameters, strict=True))  # an optimizer's
    small = ValueModel(tiny_model(hidden_size=16).model)
    with pytest.raises(RuntimeError, match="size mismatch"):
        small.load(tmp_path)
