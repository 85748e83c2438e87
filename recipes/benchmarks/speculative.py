"""Measure drafting with the model's own heads: `generate` with and without `SpeculativeDecoder`.

    python recipes/benchmarks/speculative.py --json outputs/speculative.json

The first run trains a Qwen3 of 21M parameters with four MTP heads (`MTPSFTTrainer`, trunk and heads from scratch) on
sums that are worked in words, and keeps it in `--model-dir` for the next. One token is one character. Both decoders
then complete the same prompts, in one process and in turns (A B B A ...), with the same model and the same number of
tokens and rows; end-of-text is suppressed. The benchmark prints tokens per second, and the ratio within a repetition,
as the median over repetitions. It also prints the share of drafts that were accepted at each place, among those whose
earlier drafts were all accepted. Every run has a decoder of its own, which first measures what drafts cost; that is
part of its time.

    trained   the heads as they were trained
    poor      heads with random weights, whose drafts are rejected: the cost of drafting where it gains nothing

Before anything is timed, greedy completions of both are compared, and a difference is an error. Goals: 1.5 times the
tokens per second at batch size 1, 1.3 times at 16, and at least 0.95 times with poor heads.

Another model gets heads that are trained on its own completions with the trunk frozen:

    python recipes/benchmarks/speculative.py --model Qwen/Qwen3-0.6B --device cuda --dtype bfloat16

`--head-type sequential --heads 1` trains one decoder layer that also reads the newest token, as DeepSeek-V3 has it, in
place of parallel heads.

If a device spends the time of a step on reading weights, and not on arithmetic, verifying a draft costs no time. The
last column is the speed-up on such a device, computed from the measured acceptance `a_k` by place:
`(1 + a_1 + a_1 a_2 + ...) / (1 + c)`, where c is the cost of all drafts of a step, as the share of the model's weights
that they read (Leviathan et al., 2211.17192, theorem 3.8, which has one acceptance for all places). The column is a
projection, not a measurement.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from rl_plugins.functional import mtp_labels
from rl_plugins.nn import (
    MTPHeads,
    SequentialHeads,
    attach_mtp_heads,
    head_token_loss,
    load_mtp_heads,
    logit_cap,
    logit_divisor,
)
from rl_plugins.nn.mtp_heads import HEAD_TYPES
from rl_plugins.process_group import end_process_group
from rl_plugins.rollouts import SpeculativeDecoder
from rl_plugins.signals.options import MTP_LOSS_TYPES
from rl_plugins.trl import MTPSFTConfig, MTPSFTTrainer

CHARACTERS = "0123456789+-=., abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
PROMPTS_NAME = "prompts.json"
GOALS = {("trained", 1): 1.5, ("trained", 16): 1.3, ("poor", 1): 0.95, ("poor", 16): 0.95}


# The task, and a model for it


def worked_sum(dice: random.Random, terms: int) -> dict[str, str]:
    """Make a sum, and the text that works it out."""
    total = dice.randint(0, 20)
    prompt, steps = str(total), []
    for _ in range(terms - 1):
        number, plus = dice.randint(1, 9), dice.random() < 0.5
        before, total = total, total + number if plus else total - number
        prompt += f"{'+' if plus else '-'}{number}"
        verb, link = ("Adding", "to") if plus else ("Subtracting", "from")
        steps.append(f"{verb} {number} {link} {before} gives {total}. ")
    return {"prompt": f"{prompt}=", "completion": f" {''.join(steps)}The answer is {total}."}


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def new_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Make a Qwen3 with random weights."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=25 * args.hidden_size // 8,
        num_hidden_layers=args.layers,
        num_attention_heads=max(1, args.hidden_size // 64),
        num_key_value_heads=max(1, args.hidden_size // 64),
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def train_heads(model: Any, tokenizer: Any, rows: Dataset, args: argparse.Namespace, **options: Any) -> None:
    """Train the heads, and the trunk unless it is frozen, and save both."""
    config = MTPSFTConfig(
        output_dir=str(args.model_dir),
        max_steps=args.steps,
        num_mtp_heads=args.heads,
        mtp_head_type=args.head_type,
        mtp_loss_type=args.loss,
        mtp_loss_share=args.loss_share,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=args.device == "cpu",
        report_to="none",
        seed=0,
        **options,
    )
    trainer = MTPSFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(args.model_dir))


def make_small(args: argparse.Namespace) -> None:
    """Train a model for sums in words, from scratch."""
    tokenizer, dice = character_tokenizer(), random.Random(0)
    rows = [worked_sum(dice, dice.randint(4, 7)) for _ in range(args.steps * 8)]
    set_seed(0)
    train_heads(
        new_model(args, tokenizer),
        tokenizer,
        Dataset.from_list(rows),
        args,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        head_learning_rate=1e-3,
        mtp_loss_coef=1.0,
        mtp_detach_trunk=False,
    )
    prompts = [worked_sum(dice, 7)["prompt"] for _ in range(64)]
    (args.model_dir / PROMPTS_NAME).write_text(json.dumps(prompts))


def make_pretrained(args: argparse.Namespace) -> None:
    """Train heads for a finished model on the model's own completions."""
    unpacked = {"quantization_config": GgufConfig(dequantize=True)} if args.gguf_file else {}
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model, gguf_file=args.gguf_file, dtype="float32", **unpacked
    ).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf_file, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dice = random.Random(0)
    chats = [
        [{"role": "user", "content": f"Work out {worked_sum(dice, 4)['prompt'][:-1]} step by step."}]
        for _ in range(args.rows + 64)
    ]
    prompts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    rows = own_completions(model, tokenizer, prompts[: args.rows], args)
    train_on_states(model, rows, args)
    model.save_pretrained(args.model_dir)
    tokenizer.save_pretrained(args.model_dir)
    (args.model_dir / PROMPTS_NAME).write_text(json.dumps(prompts[args.rows :]))


def own_completions(
    model: Any, tokenizer: Any, prompts: list[str], args: argparse.Namespace
) -> list[dict[str, list[int]]]:
    """Sample the completions that the heads learn from, and keep them in a file for heads of another type."""
    path = args.own_completions or args.model_dir / "completions.json"
    if path.is_file():
        return json.loads(path.read_text())
    rows = []
    for start in tqdm(range(0, len(prompts), 32), "completions"):
        inputs = encode(tokenizer, prompts[start : start + 32], args.device)
        torch.manual_seed(start)
        output = model.generate(
            **inputs,
            max_new_tokens=args.new_tokens,
            do_sample=True,
            temperature=args.temperature,
            top_k=0,
            top_p=1.0,
            pad_token_id=tokenizer.pad_token_id,
        )
        rows += own_rows(inputs, output, tokenizer.eos_token_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return rows


def own_rows(inputs: dict[str, Tensor], output: Tensor, eos: int) -> list[dict[str, list[int]]]:
    """Return the tokens of prompts and completions, each up to its first end of text, if it has one."""
    width, rows = inputs["input_ids"].shape[1], []
    for tokens, mask in zip(output.tolist(), inputs["attention_mask"].tolist(), strict=True):
        prompt = [token for token, real in zip(tokens, mask, strict=False) if real]
        tail = tokens[width:]
        tail = tail[: tail.index(eos) + 1] if eos in tail else tail
        rows.append({"input_ids": prompt + tail, "completion_mask": [0] * len(prompt) + [1] * len(tail)})
    return rows


def train_on_states(model: Any, rows: list[dict[str, list[int]]], args: argparse.Namespace) -> None:
    """Train heads on the states of a frozen trunk, which are computed once.

    `MTPSFTTrainer` with `freeze_trunk=True` learns from the same loss. It runs the trunk in every step, which would be
    most of the work here, since heads of one layer learn several times from every row.
    """
    model.requires_grad_(False)
    heads = attach_mtp_heads(model, args.heads, head_type=args.head_type).requires_grad_(True)
    heads.draft_only()
    with torch.no_grad():
        ids = [torch.tensor([row["input_ids"]], device=args.device) for row in rows]
        hidden = [model.base_model(input_ids=x).last_hidden_state[0] for x in tqdm(ids, "states")]
    learning = [p for p in heads.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=args.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    dice = torch.Generator().manual_seed(0)
    bar = tqdm(range(args.steps), "heads")
    for step in bar:
        start = step * args.batch_rows % len(rows)
        if start < args.batch_rows:
            order = torch.randperm(len(rows), generator=dice).tolist()
        taken = order[start : start + args.batch_rows]
        losses, counts = state_loss(model, heads, [rows[i] for i in taken], [hidden[i] for i in taken], args)
        loss = losses.sum() / counts.sum()
        loss.backward()
        nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def state_loss(
    model: Any, heads: MTPHeads, rows: list[dict[str, list[int]]], hidden: list[Tensor], args: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    """Compute the token loss of each head on some rows, and its number of labels (K,), from the states (L, D)."""

    def padded(rows: list[Any], value: float) -> Tensor:
        return pad_sequence([torch.as_tensor(row, device=args.device) for row in rows], True, value)

    ids, states = padded([row["input_ids"] for row in rows], 0), padded(hidden, 0.0)
    real = padded([[1] * len(row["input_ids"]) for row in rows], 0)
    said = padded([row["completion_mask"] for row in rows], 0)
    labels = mtp_labels(torch.where(said == 1, ids, -100), heads.config.num_heads, ahead=heads.ahead)
    read = states
    if isinstance(heads, SequentialHeads):
        read = heads.deepen(states, ids, real, None)
    return head_token_loss(
        partial(heads.token_features, read),
        labels,
        model.get_output_embeddings(),
        temperature=logit_divisor(model.config),
        cap=logit_cap(model.config),
        share=args.loss_share,
        teacher=states if args.loss == "distribution" else None,
        ahead=heads.ahead,
    )


# Measuring


def encode(tokenizer: Any, prompts: list[str], device: str) -> dict[str, Tensor]:
    """Encode prompts, padded on the left."""
    batch = tokenizer(text=prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    return {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}


def seconds(call: Any, device: str) -> tuple[float, Any]:
    """Return the time of a call, and its result."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure(
    model: Any, inputs: dict[str, Tensor], options: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """Measure tokens per second of both decoders on one batch, their ratio, and the acceptance of drafts."""
    tokens = len(inputs["input_ids"]) * args.new_tokens
    speeds: dict[str, list[float]] = {"generate": [], "speculative": []}
    decoder = SpeculativeDecoder(draft_cost=args.draft_cost)
    for repeat in range(args.repeats + 1):  # the first is not counted
        for name in list(speeds) if repeat % 2 == 0 else list(speeds)[::-1]:
            decoder = SpeculativeDecoder(draft_cost=args.draft_cost) if name == "speculative" else decoder
            torch.manual_seed(repeat)
            extra = {"custom_generate": decoder} if name == "speculative" else {}
            elapsed, output = seconds(lambda extra=extra: model.generate(**inputs, **options, **extra), args.device)
            if output.numel() != tokens + inputs["input_ids"].numel():
                raise RuntimeError(f"{name} generated another number of tokens than asked for.")
            speeds[name].append(tokens / elapsed)
    assert decoder.last is not None and decoder.last.statistics is not None
    stock, ours = speeds["generate"][1:], speeds["speculative"][1:]
    ratios = [a / b for a, b in zip(ours, stock, strict=True)]
    return {
        "generate": statistics.median(stock),
        "speculative": statistics.median(ours),
        "ratio": statistics.median(ratios),
        "range": (min(ratios), max(ratios)),
        "tokens_per_step": decoder.last.statistics.tokens_per_step,
        "acceptance": decoder.last.statistics.acceptance,
    }


def check_greedy(model: Any, inputs: dict[str, Tensor], options: dict[str, Any]) -> None:
    """Raise `RuntimeError` unless both decoders choose the same tokens."""
    greedy = {**options, "do_sample": False, "temperature": None}
    stock = model.generate(**inputs, **greedy)
    if not torch.equal(stock, model.generate(**inputs, **greedy, custom_generate=SpeculativeDecoder())):
        raise RuntimeError("Greedy completions differ.")


@torch.no_grad()
def spoil(heads: nn.Module) -> None:
    """Randomize weights of the heads, so that every draft is bad."""
    torch.manual_seed(0)
    for name, param in heads.named_parameters():
        if name.endswith(("down.weight", "eh_proj.weight")):
            param.normal_(std=1.0)


def draft_cost(model: Any, heads: MTPHeads) -> float:
    """Count the weights that all drafts of a step read, in units of those that a step without drafts reads.

    Parallel heads read the LM head once for all drafts, sequential ones once for each.
    """
    own = {id(p) for p in heads.parameters()}
    lm_head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    trunk = sum(p.numel() for p in model.parameters() if id(p) not in own and p is not table and p is not lm_head)
    of_drafts = sum(p.numel() for name, p in heads.named_parameters() if "value" not in name)
    lm_reads = heads.config.num_heads if heads.reads_rows else 1
    return (of_drafts + lm_reads * lm_head.numel()) / (trunk + lm_head.numel())


def projection(acceptance: list[float], cost: float) -> float:
    """Compute the speed-up on a device that is bound by memory bandwidth; see the docstring of this file."""
    tokens = 1.0 + sum(math.prod(acceptance[: k + 1]) for k in range(len(acceptance)))
    return tokens / (1.0 + cost)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all cases."""
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    dtype = getattr(torch, args.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model_dir, dtype=dtype).to(args.device).eval()
    load_mtp_heads(model, args.model_dir)
    heads = MTPHeads.of(model)
    assert heads is not None
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir, padding_side="left")
    prompts = json.loads((args.model_dir / PROMPTS_NAME).read_text())
    options: dict[str, Any] = {
        "max_new_tokens": args.new_tokens,
        "do_sample": True,
        "temperature": args.temperature,
        "suppress_tokens": [tokenizer.eos_token_id],
        "pad_token_id": tokenizer.pad_token_id,
    }
    parameters = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in heads.parameters())
    results = []
    for case in ("trained", "poor"):
        if case == "poor":
            spoil(heads)
        for size in args.batch_sizes:
            inputs = encode(tokenizer, (prompts * size)[:size], args.device)
            if args.dtype == "float32":
                check_greedy(model, inputs, options)
            measured = measure(model, inputs, options, args)
            projected = projection(measured["acceptance"], draft_cost(model, heads))
            results.append({"case": case, "batch": size, **measured, "projection": projected})
            print(f"{case}, batch {size}: {results[-1]['ratio']:.2f}", file=sys.stderr)
    return {"parameters": parameters, "heads": heads.config.num_heads, "results": results}


def print_table(report: dict[str, Any]) -> None:
    """Print the results as a table."""
    print(
        f"{'heads':9}{'batch':>6}{'generate':>10}{'speculative':>13}{'ratio':>7}{'range':>13}{'tokens/step':>13}",
        end="",
    )
    print("   accepted by place / projection")
    for row in report["results"]:
        low, high = row["range"]
        print(
            f"{row['case']:9}{row['batch']:6}{row['generate']:10.0f}{row['speculative']:13.0f}{row['ratio']:7.2f}"
            f"{f'{low:.2f}-{high:.2f}':>13}{row['tokens_per_step']:13.2f}   "
            + " ".join(f"{rate:.2f}" for rate in row["acceptance"])
            + f" / {row['projection']:.2f}"
        )
    for row in report["results"]:
        goal = GOALS.get((row["case"], row["batch"]))
        if goal is not None:
            verdict = "met" if row["ratio"] >= goal else "missed"
            print(f"{row['case']} heads, batch {row['batch']}: {row['ratio']:.2f}, goal {goal:.2f}: {verdict}")


def main() -> None:
    """Train where there is no model yet, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path or hub id of a finished model; default: a small new one")
    parser.add_argument("--gguf-file", help="GGUF file inside --model to load weights from")
    parser.add_argument("--model-dir", type=Path, help="where the model with its heads is kept")
    parser.add_argument("--steps", type=int, default=220, help="training steps")
    parser.add_argument("--rows", type=int, default=320, help="own completions of --model that its heads learn from")
    parser.add_argument("--own-completions", type=Path, help="file that keeps them; default: in --model-dir")
    parser.add_argument("--head-type", choices=HEAD_TYPES, default="parallel", help="of MTP heads")
    parser.add_argument("--loss", choices=MTP_LOSS_TYPES, default="tokens", help="token loss of the heads")
    parser.add_argument("--loss-share", type=float, default=1.0, help="share of the tokens in the heads' token loss")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the heads of --model")
    parser.add_argument(
        "--batch-rows", type=int, default=4, help="completions that the heads of --model learn from at once"
    )
    parser.add_argument("--heads", type=int, default=4, help="number of MTP heads")
    parser.add_argument("--hidden-size", type=int, default=512, help="width of the new model")
    parser.add_argument("--layers", type=int, default=6, help="depth of the new model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="rows per batch")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens per row")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling")
    parser.add_argument("--draft-cost", type=float, help="0 always drafts; by default the clock decides when it pays")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs of each decoder")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="of the measured model")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    if args.model_dir is None:
        name = "small" if args.model is None else Path(args.model).name
        args.model_dir = Path("outputs/benchmarks/speculative") / name
    if not (args.model_dir / PROMPTS_NAME).is_file():
        args.model_dir.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(args.threads)
        (make_small if args.model is None else make_pretrained)(args)
    report = run(args)
    print(
        f"{report['parameters'] / 1e6:.1f}M parameters, {report['heads']} heads, {args.new_tokens} tokens per row, "
        f"temperature {args.temperature}, {args.device}, {args.dtype}, {args.threads} threads; tokens per second"
    )
    print_table(report)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1))
    end_process_group()


if __name__ == "__main__":
    main()
