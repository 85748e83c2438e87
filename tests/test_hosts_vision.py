"""Vision-language models: values see the images, and two gloo ranks equal one process, whichever rank has images."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rl_plugins.nn import ValueModel
from rl_plugins.nn.gradient import tie

from .helpers.processes import free_port, run_script
from .helpers.vision_models import looks, picture, vision_language

WORKER = Path(__file__).parent / "workers" / "vision_worker.py"
RUNS = [
    *product(["llava_next"], ["images", "mixed"], ["critic", "ppo", "variant", "sft"]),
    *product(["llava_next"], ["text"], ["critic", "ppo"]),
    *product(["qwen2_5_vl"], ["images", "mixed"], ["critic", "ppo"]),
]


def inputs_of(family: str, processor: Any, images: list[int]) -> dict[str, Tensor]:
    """Two prompts with an image each, padded on the left."""
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in ("1+1=", "12+3=")
    ]
    texts = [processor.apply_chat_template(message) for message in messages]
    return dict(processor(images=[[picture(i)] for i in images], text=texts, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_a_value_model_sees_what_the_policy_sees(family: str) -> None:
    policy, processor = vision_language(family)
    critic = ValueModel.prepare(None, policy)
    critic.attach(policy)
    with torch.no_grad():
        critic.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    taken: list[Tensor] = []
    for images in ([0, 1], [0, 2], [0, 1]):
        with critic.watching(taken.append), torch.no_grad():
            policy(**inputs_of(family, processor, images), labels=None, logits_to_keep=1)
    first, other, again = taken
    assert torch.equal(first, again) and torch.equal(first[0], other[0])
    assert (first[1, -4:] - other[1, -4:]).abs().min() > 1e-4
    inputs = inputs_of(family, processor, [0, 1])
    with torch.no_grad():
        hidden = critic.trunk(**inputs).last_hidden_state
    torch.testing.assert_close(first, critic.head(hidden))


def test_a_value_model_without_eyes_reads_the_tokens(tiny_model: Any) -> None:
    policy, processor = vision_language("llava_next")
    critic = ValueModel(tiny_model(vocab_size=policy.config.get_text_config().vocab_size).model)
    critic.attach(policy)
    inputs = inputs_of("llava_next", processor, [0, 1])
    taken: list[Tensor] = []
    with critic.watching(taken.append), torch.no_grad():
        policy(**inputs)
    torch.testing.assert_close(taken[0], critic(inputs["input_ids"], inputs["attention_mask"]))


def test_a_tie_is_an_identity_without_gradient() -> None:
    x, other = torch.randn(3, requires_grad=True), torch.randn(2, requires_grad=True)
    tied = tie(x * 2, [other * 3, None, torch.ones(1)])
    assert torch.equal(tied, x * 2)
    tied.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0, 2.0, 2.0] and other.grad is None
    assert tie(x.detach(), [other]).grad_fn is None
    seen, ahead = set(), [tie(x * 1, [other * 1]).grad_fn]
    while ahead:  # as DDP walks
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead.extend(following for following, _ in node.next_functions)
    assert {id(node.variable) for node in seen if hasattr(node, "variable")} == {id(x), id(other)}


def test_pairs_take_turns() -> None:
    assert [bool(row["images"]) for row in looks("mixed", 8)] == [True, True, False, False, False, False, True, True]
    assert "images" not in looks("text").column_names


def train(root: Path, ranks: int) -> None:
    """All runs, on this many ranks: two of two prompts each, or one in two micro-steps."""
    accumulation = {"gradient_accumulation_steps": 2 // ranks}
    runs = [
        {
            "out": str(root / f"{family}_{kind}_{trainer}_{ranks}"),
            "port": free_port(),
            "family": family,
            "kind": kind,
            "trainer": trainer,
            "args": {"per_device_train_batch_size": 2, **accumulation},
        }
        for family, kind, trainer in RUNS
    ]
    file = root / f"runs_{ranks}.json"
    file.write_text(json.dumps(runs))
    done = run_script(WORKER, str(file), ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("vision")
    train(root, 2)
    train(root, 1)
    return root


def results(root: Path, name: str, rank: int = 0) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    errors = [path.read_text() for path in sorted((root / name).glob("error_*.txt"))]
    assert not errors, "\n".join(errors)
    history = json.loads((root / name / "log.json").read_text())["history"]
    return load_file(root / name / f"weights_{rank}.safetensors"), [row for row in history if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS, ids="-".join)
def test_two_ranks_equal_one_process(trained: Path, run: tuple[str, str, str]) -> None:
    name = "_".join(run)
    (ours, history), (twin, _) = results(trained, f"{name}_2"), results(trained, f"{name}_2", rank=1)
    alone, expected = results(trained, f"{name}_1")
    start = dict(vision_language(run[0])[0].named_parameters())
    for key, weight in alone.items():
        assert torch.equal(ours[key], twin[key])
        torch.testing.assert_close(ours[key], weight, rtol=1e-4, atol=1e-5)
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in history] == pytest.approx([row[name] for row in expected], rel=1e-4)
    moved = {key for key in start if not torch.equal(start[key], alone[key])}
    assert any("vision" in key or "visual" in key for key in moved) == (run[1] != "text")
    if run[2] == "ppo":  # so do the value model's eyes, which start as the policy's
        pairs = {key.replace("value_model.trunk", "model"): key for key in alone if "value_model.trunk" in key}
        learnt = {key for key, own in pairs.items() if not torch.equal(start[key], alone[own])}
        assert any("vision" in key or "visual" in key for key in learnt) == (run[1] != "text")
