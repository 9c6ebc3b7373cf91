"""LoRA fine-tuning with transformers' Trainer, peft and activation (gradient) checkpointing, with and without kreg.

python examples/finetune.py                                   # a small Qwen3 with random weights
python examples/finetune.py --model deepseek-v4 --steps 20    # a small DeepSeek-V4
python examples/finetune.py --text my.txt --length 512

One line is kreg's: ``kreg.rewrite(model)``. The rest of the script is what it would be without it.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV4Config,
    PreTrainedModel,
    Qwen3Config,
    Trainer,
    TrainingArguments,
    set_seed,
)

import kreg

EXAMPLES = Path(__file__).parent
ADAPTED = {"qwen3": ["q_proj", "k_proj", "v_proj", "o_proj"], "deepseek-v4": ["q_b_proj", "kv_proj", "o_b_proj"]}


def small_model(name: str) -> PreTrainedModel:
    """A model with random weights that reads bytes."""
    set_seed(0)
    if name == "deepseek-v4":
        config = DeepseekV4Config.from_pretrained(EXAMPLES / "deepseek-v4-small")
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    config = Qwen3Config(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
    )
    return AutoModelForCausalLM.from_config(config)


def blocks(text: bytes, length: int) -> list[dict[str, torch.Tensor]]:
    """The text as training examples of equal length, an id for each byte."""
    ids = torch.tensor(list(text))
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def finetune(model: PreTrainedModel, name: str, data: list[dict[str, torch.Tensor]], steps: int) -> list[float]:
    """The losses of a LoRA run."""
    set_seed(0)  # the adapters' first weights
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules=ADAPTED[name]))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=3e-3,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": False},
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=ADAPTED, default="qwen3")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--text", type=Path, default=EXAMPLES.parent / "LICENSE")
    given = parser.parse_args()
    data = blocks(given.text.read_bytes(), given.length)

    plain = finetune(small_model(given.model), given.model, data, given.steps)

    model = small_model(given.model)
    kreg.rewrite(model)
    rewritten = finetune(model, given.model, data, given.steps)

    print("\nstep    without kreg    with kreg")
    for step, (before, after) in enumerate(zip(plain, rewritten, strict=True), start=1):
        print(f"{step:4}    {before:12.4f}    {after:9.4f}")
    report = kreg.report(model)
    replaced = ", ".join(f"{row['replaced']} of {row['found']} {op}" for op, row in report.summary.items())
    print(f"\nreplaced: {replaced}")
    print(f"{report.calls.rewritten} calls ran the rewritten graphs, {report.calls.original} the original code")
    print(f"largest difference of a loss: {max(abs(a - b) for a, b in zip(plain, rewritten, strict=True)):.1e}")


if __name__ == "__main__":
    main()
