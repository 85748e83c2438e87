"""Trains a critic on each of two ranks with an engine of its own: `torchrun --nproc_per_node 2 vllm_worker.py folder`.

The folder holds `model` with its tokenizer. Every rank leaves `rank_<rank>.json`: the gaps that the trainer logged,
the names that were streamed, the completions, and the sum of the policy's weights.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from datasets import Dataset

from rl_plugins.trl import MTPCriticConfig, MTPCriticTrainer
from tests.helpers import vllm_engine as engine


def reward(completion_ids: list[list[int]], **kwargs: object) -> list[float]:
    """Differs between completions."""
    return [sum(ids) % 7 / 7 for ids in completion_ids]


def main(folder: Path) -> None:
    """Three steps."""
    engine.prepare_engine("float32")
    args = MTPCriticConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        max_completion_length=6,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **engine.VLLM,
    )
    prompts = Dataset.from_dict({"prompt": [f"{i}+{7 * i}=" for i in range(32)]})
    trainer = MTPCriticTrainer(str(folder / "model"), reward, args, train_dataset=prompts)
    names, found = engine.record_names(trainer), []
    generate = trainer._generate_and_score_completions

    def noted(inputs: object) -> dict:
        batch = generate(inputs)
        found.append(batch["completion_ids"].tolist())
        return batch

    trainer._generate_and_score_completions = noted
    trainer.train()
    rank = int(os.environ["RANK"])
    weights = sum(float(p.double().sum()) for p in trainer.model.parameters())
    result = {
        "world": trainer.accelerator.num_processes,
        "gaps": engine.gaps(trainer),
        "names": sorted(names),
        "completions": found,
        "weights": weights,
    }
    (folder / f"rank_{rank}.json").write_text(json.dumps(result))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
