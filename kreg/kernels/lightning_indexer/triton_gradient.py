"""Gradients of an indexer's selected scores in Triton, from the selected entries only.

For a query's pick ``j`` with gradient ``g`` and ``x[h] = q[h] . k[j]``: ``dw[h] = sum_j g relu(x[h])``,
``dq[h] = sum_j g w[h] [x[h] > 0] k[j]``, and ``dk[j]`` gets ``sum_h g w[h] [x[h] > 0] q[h]``. The first two are sums of
one program. The last has a part for each pick; PyTorch sorts those by entry and adds them in order, so all three are
the same at every run.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# (parameters of Triton functions are Triton values)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kreg.kernels.gpu import Table, current_target, launch
from kreg.kernels.lightning_indexer.triton_scores import dot, heads_of, weights_of, within_32_bits


@triton.jit
def picks_of(k, indices, best, grads, pick, near, k_entry, k_dim, dims, dim, scale):
    """The keys of some picks of a query, [BLOCK_K, BLOCK_D], and the scaled gradients of their scores, float32."""
    entry = tl.load(indices + pick, mask=near, other=0)
    score = tl.load(best + pick, mask=near, other=float("-inf"))
    grad = tl.load(grads + pick, mask=near, other=0.0).to(tl.float32) * scale
    chosen = near & (entry >= 0) & (score != float("-inf"))
    mask = chosen[:, None] & (dims[None, :] < dim)
    keys = tl.load(k + entry[:, None].to(tl.int64) * k_entry + dims[None, :] * k_dim, mask=mask, other=0.0)
    return keys, tl.where(chosen, grad, 0.0)


@triton.jit
def query_gradient_kernel(
    grad_q,
    grad_weights,
    q,
    k,
    weights,
    indices,
    best,
    grads,
    q_batch,
    q_row,
    q_head,
    q_dim,
    k_batch,
    k_entry,
    k_dim,
    w_batch,
    w_row,
    w_head,
    rows,
    heads,
    dim,
    topk,
    scale,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of one query and its weights, dense as indices, best and grads are; programs: rows, heads, batch."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    inside = head < heads
    at = batch * rows + row
    queries = heads_of(q + batch * q_batch, row + head * 0, head, dims, inside, q_row, q_head, q_dim, heads, dim)
    weight = weights_of(weights + batch * w_batch, row + head * 0, head, inside, w_row, w_head, heads)
    k += batch * k_batch
    indices += at * topk
    best += at * topk
    grads += at * topk
    by_weight = tl.zeros((BLOCK_H,), dtype=tl.float32)
    by_query = tl.zeros((BLOCK_H, BLOCK_D), dtype=tl.float32)
    for start in range(0, topk, BLOCK_K):
        pick = start + tl.arange(0, BLOCK_K)
        keys, grad = picks_of(k, indices, best, grads, pick, pick < topk, k_entry, k_dim, dims, dim, scale)
        products = dot(queries, tl.trans(keys))
        positive = products > 0.0
        if grad_weights is not None:
            by_weight += tl.sum(tl.where(positive, products * grad[None, :], 0.0), 1)
        if grad_q is not None:
            by_product = tl.where(positive, weight[:, None] * grad[None, :], 0.0)
            by_query += dot(by_product.to(keys.dtype), keys)
    if grad_weights is not None:
        tl.store(grad_weights + at * heads + head, by_weight, mask=inside)
    if grad_q is not None:
        to = grad_q + (at * heads + head)[:, None] * dim + dims[None, :]
        tl.store(to, by_query, mask=inside[:, None] & (dims[None, :] < dim))


@triton.jit
def key_gradient_kernel(
    parts,
    q,
    k,
    weights,
    indices,
    best,
    grads,
    q_row,
    q_head,
    q_dim,
    k_entry,
    k_dim,
    w_row,
    w_head,
    heads,
    dim,
    topk,
    scale,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What one query gives to the gradients of its picks, [rows, topk, dim]; programs: rows, parts of the picks."""
    row = tl.program_id(0).to(tl.int64)
    pick = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, BLOCK_D)
    near = pick < topk
    at = row * topk
    keys, grad = picks_of(k, indices + at, best + at, grads + at, pick, near, k_entry, k_dim, dims, dim, scale)
    total = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    for start in range(0, heads, BLOCK_H):
        head = start + tl.arange(0, BLOCK_H)
        inside = head < heads
        queries = heads_of(q, row + head * 0, head, dims, inside, q_row, q_head, q_dim, heads, dim)
        weight = weights_of(weights, row + head * 0, head, inside, w_row, w_head, heads)
        products = dot(keys, tl.trans(queries))
        by_product = tl.where(products > 0.0, weight[None, :] * grad[:, None], 0.0)
        total += dot(by_product.to(queries.dtype), queries)
    to = parts + (at + pick)[:, None] * dim + dims[None, :]
    tl.store(to, total, mask=near[:, None] & (dims[None, :] < dim))


def gradients(
    table: Table,
    wanted: dict[str, torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    best: torch.Tensor,
    grads: torch.Tensor,
    *,
    scale: float,
    workspace: int,
) -> None:
    """Fill ``wanted`` with the gradients of the selected scores.

    Args:
        table: the tuning table.
        wanted: by name of the argument, contiguous, in its shape; "k" is float32 and zero.
        q, k, weights: as the op has them, q and k of one dtype.
        indices, best: the op's results.
        grads: the gradient of ``best``.
        scale: factor on the scores.
        workspace: bytes that the parts of the keys' gradient may take at once.
    """
    (batch, rows, heads, dim), topk = q.shape, indices.shape[2]
    target, block_d = current_target(q.device), max(16, triton.next_power_of_2(dim))
    q, weights, k = within_32_bits(q, 2), within_32_bits(weights, 2), within_32_bits(k, 2)
    facts = {"bytes": q.element_size(), "index_dim": dim}
    indices, best, grads = indices.contiguous(), best.contiguous(), grads.contiguous()
    if "q" in wanted or "weights" in wanted:
        config = table.pick("query_gradient_kernel", target, **facts)
        launch(
            query_gradient_kernel,
            (rows, triton.cdiv(heads, config["BLOCK_H"]), batch),
            config,
            grad_q=wanted.get("q"),
            grad_weights=wanted.get("weights"),
            q=q,
            k=k,
            weights=weights,
            indices=indices,
            best=best,
            grads=grads,
            q_batch=q.stride(0),
            q_row=q.stride(1),
            q_head=q.stride(2),
            q_dim=q.stride(3),
            k_batch=k.stride(0),
            k_entry=k.stride(1),
            k_dim=k.stride(2),
            w_batch=weights.stride(0),
            w_row=weights.stride(1),
            w_head=weights.stride(2),
            rows=rows,
            heads=heads,
            dim=dim,
            topk=topk,
            scale=scale,
            BLOCK_D=block_d,
        )
    if "k" not in wanted:
        return
    config = table.pick("key_gradient_kernel", target, **facts)
    step = max(1, workspace // (4 * topk * dim))
    spread = torch.arange(step * topk, device=q.device).remainder_(k.shape[1])
    for b in range(batch):
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            count = part.stop - part.start
            parts = q.new_empty(count * topk, dim, dtype=torch.float32)
            launch(
                key_gradient_kernel,
                (count, triton.cdiv(topk, config["BLOCK_K"])),
                config,
                parts=parts,
                q=q[b, part],
                k=k[b],
                weights=weights[b, part],
                indices=indices[b, part],
                best=best[b, part],
                grads=grads[b, part],
                q_row=q.stride(1),
                q_head=q.stride(2),
                q_dim=q.stride(3),
                k_entry=k.stride(1),
                k_dim=k.stride(2),
                w_row=weights.stride(1),
                w_head=weights.stride(2),
                heads=heads,
                dim=dim,
                topk=topk,
                scale=scale,
                BLOCK_D=block_d,
            )
            chosen = indices[b, part].flatten()
            # What selects nothing adds zeros, spread over the entries: many to one would be added one by one.
            chosen = torch.where(chosen < 0, spread[: count * topk], chosen)
            wanted["k"][b].index_put_((chosen,), parts, accumulate=True)
