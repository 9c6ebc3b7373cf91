"""An op, a rule and a kernel of one's own, outside the package: SwiGLU in a small Llama.

python examples/own_op.py
"""

import torch
from torch.fx import Node
from torch.nn.functional import silu
from transformers import LlamaConfig, LlamaForCausalLM

import kreg
from kreg.rewriters.graph import shape_of, users
from kreg.rewriters.site import Operand, Output, Refused, Site

aten = torch.ops.aten


# 1. The op: what is computed, on no device in particular.


def samples(dtype, generator):
    """Arguments to test kernels with, edges included."""
    for shape in ((1, 1, 8), (2, 7, 24), (1, 0, 16)):
        gate, up = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        yield {"gate": gate, "up": up}


SWIGLU = kreg.Op(
    name="swiglu",
    summary="silu(gate) * up",
    schema="(Tensor gate, Tensor up) -> Tensor",
    tensors={"gate": "batch tokens features", "up": "batch tokens features"},
    differentiable=("gate", "up"),
    reference=lambda gate, up: silu(gate) * up,
    fake=lambda gate, up: torch.empty_like(gate),
    samples=samples,
    # floating-point operations and bytes moved, for the plan's estimates
    work=lambda dims, attributes: tuple(n * dims["batch"] * dims["tokens"] * dims["features"] for n in (5.0, 12.0)),
    source="Shazeer 2020, GLU Variants Improve Transformer",
)


# 2. The rule: how it is recognised in a graph. It names no model and no module class.


def is_product(node: Node) -> bool:
    return node.target is aten.mul.Tensor and any(_is_silu(a) for a in node.args)


def _is_silu(argument: object) -> bool:
    return isinstance(argument, Node) and argument.target is aten.silu.default


def find(context, product: Node) -> Site:
    """The SwiGLU that ends in a product; refuses with a sentence where one is not proven."""
    left, right = product.args
    activated, up = (left, right) if _is_silu(left) else (right, left)
    gate = activated.args[0]
    if not isinstance(up, Node) or shape_of(up) != shape_of(gate) or len(shape_of(gate)) != 3:
        raise Refused("the gate and what it gates are not of one shape [batch, tokens, features]", product)
    if users(activated) != [product]:
        raise Refused("the activated gate is used elsewhere too", activated)
    return Site(SWIGLU, product, {"gate": Operand(gate), "up": Operand(up)}, {}, (Output(product, 0),))


kreg.register(kreg.Rule(op=SWIGLU, is_anchor=is_product, find=find))


# 3. The kernel: one way to compute it.


def swiglu_backward(grads, outputs, needs, *, gate, up):
    """Gradients by name, for the arguments in ``needs``; the activation is computed again, not stored."""
    (grad,) = grads
    found = {"gate": aten.silu_backward(grad * up, gate), "up": silu(gate).mul_(grad)}
    return {name: found[name] for name in needs}


@kreg.kernel(
    op="swiglu",
    name="mine.swiglu",
    summary="one buffer instead of two",
    backward=swiglu_backward,
    devices=["cpu"],
    dtypes=["float32", "bfloat16"],
    constraints=["features % 8 == 0"],
    trains=True,
)
def swiglu(gate, up):
    return silu(gate).mul_(up)


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    tokens = torch.randint(64, (2, 16))
    expected = model(tokens).logits

    kreg.rewrite(model, example_inputs=(tokens,))

    mine = [site for site in kreg.report(model).sites if site.op == "swiglu"]
    passed = all(site.status == "replaced" and site.verify.passed for site in mine)
    print(f"\n{len(mine)} swiglu sites, all replaced and verified: {passed}")
    print(f"largest difference from eager: {(model(tokens).logits - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
