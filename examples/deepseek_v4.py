"""DeepSeek-V4 on the CPU: a small model with random weights, rewritten in place and compared with eager.

python examples/deepseek_v4.py                          # rewrite, compare, restore
kreg rewrite examples/deepseek-v4-small                 # the same model, on the command line
kreg rewrite examples.deepseek_v4:model_and_inputs      # likewise, from the function below
"""

import os
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import kreg

TOKENS = int(os.environ.get("TOKENS", "1024"))


def model_and_inputs() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model and an input, as the command line wants them from a function.

    It has a layer of each kind: a sliding window of keys (layer 0), that and selected compressed entries (1),
    that and every compressed entry that is ready (2).
    """
    config = DeepseekV4Config.from_pretrained(Path(__file__).parent / "deepseek-v4-small")
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32)
    return model.eval(), {"input_ids": torch.randint(config.vocab_size, (1, TOKENS))}


def step(model: torch.nn.Module, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Logits, the gradients of all parameters, and the seconds that both took."""
    model.zero_grad()
    start = time.perf_counter()
    logits = model(input_ids=input_ids).logits
    cross_entropy(logits[0, :-1], input_ids[0, 1:]).backward()
    seconds = time.perf_counter() - start
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return logits.detach(), gradients, seconds


def main() -> None:
    model, inputs = model_and_inputs()
    step(model, **inputs)  # the first call of all pays for what later ones find in place
    logits, gradients, before = step(model, **inputs)

    kreg.rewrite(model, device="cpu", example_inputs=inputs)

    step(model, **inputs)
    new_logits, new_gradients, after = step(model, **inputs)
    calls = kreg.report(model).calls
    print(f"\n{calls.rewritten} calls ran the rewritten graph, {calls.original} the original code")
    errors = relative(new_logits, logits), relative(new_gradients, gradients)
    print("relative error of logits {:.1e}, of gradients {:.1e}".format(*errors))
    print(f"forward and backward of {TOKENS} tokens: {before:.2f} s before, {after:.2f} s after")

    kreg.restore(model)
    print(f"restored: {torch.equal(step(model, **inputs)[0], logits)}")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


if __name__ == "__main__":
    main()
