"""DeepSeek-V4 on the CPU: a small model with random weights, rewritten in place and compared with eager.

    python examples/deepseek_v4.py                              # rewrite, compare, restore
    kreg rewrite examples.deepseek_v4:model_and_inputs          # the report of the same model, on the command line
"""

import os
import time

import torch
from torch.nn.functional import cross_entropy
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import kreg

TOKENS = int(os.environ.get("TOKENS", "1024"))


def small_model() -> DeepseekV4ForCausalLM:
    """One layer of each kind: a window alone, with selected compressed entries (CSA), with all ready ones (HCA)."""
    config = DeepseekV4Config(
        vocab_size=256,
        hidden_size=512,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["moe", "moe", "moe"],
        num_attention_heads=16,
        head_dim=128,
        q_lora_rank=256,
        o_groups=4,
        o_lora_rank=128,
        sliding_window=128,
        index_n_heads=16,
        index_head_dim=64,
        index_topk=128,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=256,
        max_position_embeddings=8192,
        use_cache=False,  # a call with a cache runs the original code
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return DeepseekV4ForCausalLM(config).eval()


def model_and_inputs() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model and an input: what ``kreg`` on the command line asks a function for."""
    generator = torch.Generator().manual_seed(0)
    return small_model(), {"input_ids": torch.randint(256, (1, TOKENS), generator=generator)}


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
    print(f"logits differ by {relative(new_logits, logits):.1e}, gradients by {relative(new_gradients, gradients):.1e}")
    print(f"forward and backward of {TOKENS} tokens: {before:.2f} s before, {after:.2f} s after")

    kreg.restore(model)
    print(f"restored: {torch.equal(step(model, **inputs)[0], logits)}")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


if __name__ == "__main__":
    main()
