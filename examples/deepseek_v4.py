"""DeepSeek-V4 on the CPU: a small model with random weights, rewritten in place and compared with eager.

    python examples/deepseek_v4.py                                # rewrites, compares, prints the report
    kreg rewrite examples.deepseek_v4:model_and_inputs            # the same model on the command line
"""

import os
import time

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

import kreg

TOKENS = int(os.environ.get("TOKENS", "1024"))


def small_model() -> DeepseekV4ForCausalLM:
    """One layer of each kind: a sliding window, selected compressed entries (CSA), all ready ones (HCA)."""
    config = DeepseekV4Config(
        vocab_size=256,
        hidden_size=512,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["moe", "moe", "moe"],
        num_attention_heads=16,
        head_dim=128,
        qk_rope_head_dim=64,
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
        use_cache=False,  # a cache is state, and calls with one run the original code
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return DeepseekV4ForCausalLM(config).eval()


def model_and_inputs(tokens: int = TOKENS) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The model and an input, in the form that the command line takes."""
    generator = torch.Generator().manual_seed(0)
    return small_model(), {"input_ids": torch.randint(256, (1, tokens), generator=generator)}


def timed(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Logits, and the seconds of the faster of two calls."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            logits = model(**inputs).logits
        seconds.append(time.perf_counter() - start)
    return logits, min(seconds)


def main() -> None:
    model, inputs = model_and_inputs()
    expected, before = timed(model, inputs)

    kreg.rewrite(model, device="cpu", example_inputs=inputs)

    logits, after = timed(model, inputs)
    print(f"\nlargest difference from eager: {(logits - expected).abs().max():.1e}")
    print(f"forward of {TOKENS} tokens: {1e3 * before:.0f} ms before, {1e3 * after:.0f} ms after")

    calls = kreg.report(model).calls
    print(f"calls answered by the rewritten graph: {calls.rewritten}, by the original code: {calls.original}")

    kreg.restore(model)
    print(f"restored: {torch.equal(timed(model, inputs)[0], expected)}")


if __name__ == "__main__":
    main()
