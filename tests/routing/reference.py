"""SiRA's routed layer in plain loops of float64, forwards and backwards, derived by hand.

It shares no code with `sira_jax`: groups, tokens, choices and experts are visited one by one.
"""

import dataclasses
import math
from fractions import Fraction

import numpy as np


@dataclasses.dataclass
class Reference:
    """Results of `reference_layer`; gradients are of sum(delta * cotangent) + weighted losses."""

    capacity: int
    probs: np.ndarray
    gates: np.ndarray
    selected: np.ndarray
    kept: np.ndarray
    position: np.ndarray
    choices: dict
    delta: np.ndarray
    load_balance_loss: float
    router_z_loss: float
    grad_x: np.ndarray
    grad_router: np.ndarray
    grad_a: np.ndarray
    grad_b: np.ndarray


def reference_capacity(tokens, config, deterministic):
    factor = config.eval_capacity_factor if deterministic else config.capacity_factor
    if factor is None:
        return tokens
    k = config.num_selected_experts if config.capacity_counts_k else 1
    return max(
        config.min_capacity, math.ceil(Fraction(str(factor)) * k * tokens / config.num_experts)
    )


def reference_layer(
    x,
    valid,
    router,
    lora_a,
    lora_b,
    config,
    *,
    scale=1.0,
    deterministic=True,
    dropout_mask=None,
    logits=None,
    cotangent=None,
    load_balance_weight=0.0,
    z_weight=0.0,
):
    """`dropout_mask` (G, S, E) holds 1 / (1 - q) where a gate is kept, else 0; None drops nothing.

    `logits` may be given, to control ties; gradients then still go through x @ router.
    """
    x, router, lora_a, lora_b = (np.asarray(v, np.float64) for v in (x, router, lora_a, lora_b))
    valid = np.asarray(valid, bool)
    num_groups, num_tokens, _ = x.shape
    num_experts, k = config.num_experts, config.num_selected_experts
    d_out = lora_b.shape[-1]
    capacity = reference_capacity(num_tokens, config, deterministic)
    shape = (num_groups, num_tokens, num_experts)
    mask = np.ones(shape) if dropout_mask is None else np.asarray(dropout_mask, np.float64)
    before = config.expert_dropout_position == "before_topk"
    cotangent = np.zeros((*shape[:2], d_out)) if cotangent is None else np.asarray(cotangent, float)

    log_z = np.zeros(shape[:2])
    probs, gates, uncut = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    selected, kept = np.zeros(shape, bool), np.zeros(shape, bool)
    position = np.full(shape, -1)
    choices = {}
    totals, is_divided = np.ones(shape[:2]), np.zeros(shape[:2], bool)

    for g in range(num_groups):
        for s in range(num_tokens):
            if not valid[g, s]:
                continue
            row = x[g, s] @ router if logits is None else np.asarray(logits[g, s], np.float64)
            top = row.max()
            log_z[g, s] = top + math.log(sum(math.exp(v - top) for v in row))
            probs[g, s] = [math.exp(v - log_z[g, s]) for v in row]
            scores = probs[g, s] * mask[g, s] if before else probs[g, s]
            choices[g, s] = sorted(range(num_experts), key=lambda e: (-scores[e], e))[:k]
            for e in choices[g, s]:
                selected[g, s, e] = True
            total = sum(scores[e] for e in choices[g, s])
            is_divided[g, s] = config.renormalize and total != 0
            totals[g, s] = total if is_divided[g, s] else 1.0
            for e in choices[g, s]:
                uncut[g, s, e] = scores[e] / totals[g, s] * (1.0 if before else mask[g, s, e])
        queues = [0] * num_experts
        for choice in range(k):
            for s in range(num_tokens):
                if not valid[g, s]:
                    continue
                e = choices[g, s][choice]
                if uncut[g, s, e] == 0:
                    continue
                position[g, s, e] = queues[e]
                queues[e] += 1
                if position[g, s, e] < capacity:
                    kept[g, s, e] = True
                    gates[g, s, e] = uncut[g, s, e]

    count = max(valid.sum(), 1)
    share = selected.sum(axis=(0, 1)) / count
    load_balance = num_experts * sum(share * probs.sum(axis=(0, 1)) / count)
    z_loss = sum(v**2 for v in log_z[valid]) / count

    delta = np.zeros((*shape[:2], d_out))
    grad_x, grad_router = np.zeros_like(x), np.zeros_like(router)
    grad_a, grad_b = np.zeros_like(lora_a), np.zeros_like(lora_b)
    for g in range(num_groups):
        for s in range(num_tokens):
            if not valid[g, s]:
                continue
            grad_gate = np.zeros(num_experts)
            for e in range(num_experts):
                if not kept[g, s, e]:
                    continue
                hidden = x[g, s] @ lora_a[e]
                out = hidden @ lora_b[e]
                delta[g, s] += scale * gates[g, s, e] * out
                weight = scale * gates[g, s, e]
                grad_gate[e] = scale * out @ cotangent[g, s]
                grad_b[e] += weight * np.outer(hidden, cotangent[g, s])
                grad_hidden = weight * (lora_b[e] @ cotangent[g, s])
                grad_a[e] += np.outer(x[g, s], grad_hidden)
                grad_x[g, s] += lora_a[e] @ grad_hidden
            # Gate of a selected expert: p m / total, total = sum over the selected of p m (before),
            # or p m / total with total = sum over the selected of p (after).
            grad_probs = load_balance_weight * num_experts * share / count
            for e in choices[g, s]:
                factor = mask[g, s, e] / totals[g, s]
                grad_probs[e] += grad_gate[e] * factor
                if is_divided[g, s]:
                    for other in choices[g, s]:
                        slope = mask[g, s, e] if before else 1.0
                        pull = grad_gate[other] * uncut[g, s, other] / totals[g, s]
                        grad_probs[e] -= pull * slope
            p = probs[g, s]
            grad_logits = p * (grad_probs - p @ grad_probs)
            grad_logits += z_weight * 2 * log_z[g, s] * p / count
            grad_router += np.outer(x[g, s], grad_logits)
            grad_x[g, s] += router @ grad_logits
    return Reference(
        capacity=capacity,
        probs=probs,
        gates=gates,
        selected=selected,
        kept=kept,
        position=position,
        choices=choices,
        delta=delta,
        load_balance_loss=load_balance,
        router_z_loss=z_loss,
        grad_x=grad_x,
        grad_router=grad_router,
        grad_a=grad_a,
        grad_b=grad_b,
    )
