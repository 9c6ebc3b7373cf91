"""Generation with and without kreg: the same tokens, and what prompts and tokens cost beside the original.

python examples/generate.py                               # a small Qwen3 and a small DeepSeek-V4, random weights
python examples/generate.py --prompt 512 2048 --new 32

Nothing but one line of the script is kreg's. A prompt runs rewritten layers, which fill the cache; single tokens
behind it run the model's own code.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DeepseekV4Config, PreTrainedConfig, PreTrainedModel, Qwen3Config

import kreg


def qwen3() -> PreTrainedConfig:
    return Qwen3Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        attn_implementation="eager",
    )


def deepseek_v4() -> PreTrainedConfig:
    """One layer of each kind: a sliding window, selected entries of 4 tokens, all entries of 128."""
    return DeepseekV4Config.from_pretrained(
        Path(__file__).parent / "deepseek-v4-small", use_cache=True, attn_implementation="eager"
    )


MODELS = {"qwen3": qwen3, "deepseek_v4": deepseek_v4}


def generate(model: PreTrainedModel, prompt: torch.Tensor, new: int) -> tuple[torch.Tensor, float]:
    """The tokens, and the seconds that they took."""
    start = time.perf_counter()
    tokens = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, eos_token_id=None
    )
    return tokens, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--prompt", nargs="+", type=int, default=[1024], help="tokens in a prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each, in turn")
    given = parser.parse_args()
    for name in given.model:
        torch.manual_seed(0)
        config = MODELS[name]()
        original = AutoModelForCausalLM.from_config(config).eval()
        original.generation_config.pad_token_id = 0
        rewritten = AutoModelForCausalLM.from_config(config).eval()
        rewritten.load_state_dict(original.state_dict())
        rewritten.generation_config.pad_token_id = 0

        kreg.rewrite(rewritten)

        for length in given.prompt:
            compare(
                name, original, rewritten, torch.randint(1, config.vocab_size, (1, length)), given.new, given.rounds
            )
        calls = kreg.report(rewritten).calls
        print(f"{name}: {calls.rewritten} calls ran rewritten graphs, {calls.original} the original code")


def compare(
    name: str, original: PreTrainedModel, rewritten: PreTrainedModel, prompt: torch.Tensor, new: int, rounds: int
) -> None:
    """Prints whether tokens are equal, and ratios of time: medians over rounds in which both take turns."""
    _, first = generate(rewritten, prompt, new)  # a prompt of a new form is captured now
    expected, _ = generate(original, prompt, new)
    equal = torch.equal(generate(rewritten, prompt, new)[0], expected)
    prompts, decoding = [], []
    for _ in range(rounds):
        before, after = (generate(model, prompt, 1)[1] for model in (original, rewritten))
        whole_before, whole_after = (generate(model, prompt, new)[1] for model in (original, rewritten))
        prompts.append(before / after)
        decoding.append(max(whole_before - before, 0.0) / max(whole_after - after, 1e-9))
    print(
        f"{name}, a prompt of {prompt.shape[1]}, {new} new tokens: equal tokens: {equal}; the prompt "
        f"{statistics.median(prompts):.2f} x as fast as before, each token {statistics.median(decoding):.2f} x "
        f"(first call, which captures: {first:.1f} s)"
    )


if __name__ == "__main__":
    main()
