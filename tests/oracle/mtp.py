"""A second oracle, for what transformers does not train: MTP and the sequence-wise balance loss. Plain torch, f64.

    mtp.py EXPORT_DIR INPUT.safetensors OUTPUT.safetensors [--lambda X] [--alpha X] [--mtp-input post|pre]

Written from the DeepSeek-V2 and -V3 reports (MLA §2.1.1, DeepSeekMoE §2.1.2, MTP §2.2), one short function for each,
with torch autograd; no code in common with transformers or with our Rust. INPUT holds `tokens` [B, L+1] i64.

    main     mean cross-entropy over B·L targets
    mtp      mean cross-entropy over B·(L-1) targets: position t joins h_t with Emb(token t+1) and predicts token t+2
    balance  sum over MoE layers (the MTP block's too) of the mean over sequences of Σ_i f_i·P_i, with
             f_i = N_r/(K·T) · #{t: expert i in the top-K of all the unbiased scores of t},
             P_i = mean over t of s_i/Σ_j s_j;  T is L, and L-1 in the MTP block. f is a constant in the backward.
    loss     main + λ·mtp + α·balance

h_t is the main model's hidden state after its final norm, as the released weights are run (transformers' own MTP module,
for one); `--mtp-input pre` takes it before that norm. eh_proj's input is [enorm(Emb); hnorm(h)], as released.

OUTPUT: loss, loss.main, loss.mtp, loss.balance (without α), logits [B, L, V], logits.mtp [B, L-1, V],
routing_margin[.experts, .groups, .unbiased] (the last: the top-K that f counts), counts.{layer} [E] i64 (tokens routed to
each expert), routes.{layer} i64 (sorted), and the gradient of every parameter under its name on disk. The copies that the
released MTP layer has of the embedding and of the head must equal the main ones and have no gradient of their own: the
main ones have the sum.
"""

import argparse
import json
import math

import torch
import torch.nn.functional as F

from common import gap_after, group_limit, read_config, read_tokens, read_weights, routing_margin, write_results


def rms_norm(x, weight, eps):
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def swiglu(w, prefix, x):
    return (F.silu(x @ w[prefix + "gate_proj.weight"].T) * (x @ w[prefix + "up_proj.weight"].T)) @ w[prefix + "down_proj.weight"].T


def yarn_mscale(factor, weight):
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_angles(c, length):
    """cos and sin [T, R/2], both times the attention factor, and the factor on the softmax scale (YaRN, arXiv 2309.00071)."""
    dim, theta, scaling = c["qk_rope_head_dim"], c["rope_theta"], c.get("rope_scaling")
    pair = torch.arange(dim // 2, dtype=torch.float64)
    frequency = theta ** (-2 * pair / dim)
    attention_factor = softmax_factor = 1.0
    if scaling:
        factor, original = scaling["factor"], scaling["original_max_position_embeddings"]

        def pair_with(rotations):  # the (fractional) pair that turns this often over the original context
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_with(scaling.get("beta_fast", 32))), 0)
        high = min(math.ceil(pair_with(scaling.get("beta_slow", 1))), dim - 1)
        slow = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
        frequency = frequency * (1 - slow) + frequency / factor * slow
        mscale, all_dim = scaling.get("mscale") or 0.0, scaling.get("mscale_all_dim") or 0.0
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else yarn_mscale(factor, 1.0)
        softmax_factor = yarn_mscale(factor, all_dim) ** 2 if all_dim else 1.0
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angles.cos() * attention_factor, angles.sin() * attention_factor, softmax_factor


def rotate(x, cos, sin):
    """Components 2j and 2j+1 of [.., T, R] are one pair."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def attention(c, w, prefix, x):
    batch, length, _ = x.shape
    heads, nope, rope, value = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    cos, sin, softmax_factor = rope_angles(c, length)

    def by_head(y, width):  # [B, T, H·width] -> [B, H, T, width]
        return y.view(batch, length, heads, width).transpose(1, 2)

    # The latents' norms use 1e-6 whatever rms_norm_eps is, as released.
    if c.get("q_lora_rank") is None:
        q = x @ w[prefix + "q_proj.weight"].T
    else:
        latent = rms_norm(x @ w[prefix + "q_a_proj.weight"].T, w[prefix + "q_a_layernorm.weight"], 1e-6)
        q = latent @ w[prefix + "q_b_proj.weight"].T
    q_nope, q_rope = by_head(q, nope + rope).split([nope, rope], dim=-1)
    latent, k_rope = (x @ w[prefix + "kv_a_proj_with_mqa.weight"].T).split([c["kv_lora_rank"], rope], dim=-1)
    latent = rms_norm(latent, w[prefix + "kv_a_layernorm.weight"], 1e-6)
    k_nope, v = by_head(latent @ w[prefix + "kv_b_proj.weight"].T, nope + value).split([nope, value], dim=-1)
    k_rope = rotate(k_rope.unsqueeze(1), cos, sin)  # one for all heads

    scores = q_nope @ k_nope.transpose(-1, -2) + rotate(q_rope, cos, sin) @ k_rope.transpose(-1, -2)
    scores = scores * ((nope + rope) ** -0.5 * softmax_factor)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).reshape(batch, length, heads * value) @ w[prefix + "o_proj.weight"].T


def choose(c, scores, bias):
    """The routed experts [N, K] by biased score, within the best groups."""
    biased = scores if bias is None else scores + bias
    num_groups, kept = group_limit(c)
    if num_groups > 1:
        by_group = biased.unflatten(-1, (num_groups, -1))
        group_score = by_group.amax(-1) if bias is None else by_group.topk(2, dim=-1).values.sum(-1)
        in_group = F.one_hot(group_score.topk(kept, dim=-1).indices, num_groups).sum(-2).bool()
        biased = by_group.masked_fill(~in_group.unsqueeze(-1), -torch.inf).flatten(-2)
    return biased.topk(c["num_experts_per_tok"], dim=-1).indices


def moe(c, w, prefix, x, record):
    batch, length, _ = x.shape
    num_experts, k = c["n_routed_experts"], c["num_experts_per_tok"]
    logits = x @ w[prefix + "gate.weight"].T  # [B, T, E]
    bias = w.get(prefix + "gate.e_score_correction_bias")
    scores = logits.sigmoid() if c["model_type"] == "deepseek_v3" else logits.softmax(-1)

    flat = scores.detach().flatten(0, 1)
    chosen = choose(c, flat, bias).view(batch, length, k)
    weights = scores.gather(-1, chosen)
    if c.get("norm_topk_prob"):
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * c["routed_scaling_factor"]

    out = swiglu(w, prefix + "shared_experts.", x)
    for expert in range(num_experts):  # every expert on every token, its weight zero where not routed: slow and plain
        weight = (weights * (chosen == expert)).sum(-1, keepdim=True)
        out = out + weight * swiglu(w, f"{prefix}experts.{expert}.", x)

    # Sequence-wise balance, eq. 17–20: top-K of the unbiased scores over all experts, no groups.
    unbiased = scores.detach().topk(k, dim=-1).indices
    f = F.one_hot(unbiased, num_experts).sum((1, 2)).double() * num_experts / (k * length)  # [B, E]
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)  # [B, E]
    experts, groups = routing_margin(c, flat, bias)
    record(
        balance=(f * p).sum(-1).mean(),
        routes=chosen.flatten(0, 1).sort(-1).values,
        counts=torch.bincount(chosen.flatten(), minlength=num_experts),
        margins=(experts, groups, gap_after(flat, k)),
    )
    return out


def block(c, w, layer, x, records):
    prefix, eps = f"model.layers.{layer}.", c["rms_norm_eps"]
    x = x + attention(c, w, prefix + "self_attn.", rms_norm(x, w[prefix + "input_layernorm.weight"], eps))
    normed = rms_norm(x, w[prefix + "post_attention_layernorm.weight"], eps)
    if layer < c["first_k_dense_replace"]:
        return x + swiglu(w, prefix + "mlp.", normed)
    return x + moe(c, w, prefix + "mlp.", normed, lambda **kwargs: records.update({layer: kwargs}))


def cross_entropy(logits, targets):
    return -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()


def forward(c, w, tokens, mtp_input):
    """(main logits, MTP logits or None, what each MoE layer recorded)."""
    records, eps = {}, c["rms_norm_eps"]
    hidden = w["model.embed_tokens.weight"][tokens[:, :-1]]  # [B, L, D]
    for layer in range(c["num_hidden_layers"]):
        hidden = block(c, w, layer, hidden, records)
    normed = rms_norm(hidden, w["model.norm.weight"], eps)
    logits = normed @ w["lm_head.weight"].T
    if not c.get("num_nextn_predict_layers"):
        return logits, None, records

    layer = c["num_hidden_layers"]
    prefix = f"model.layers.{layer}."
    state = (normed if mtp_input == "post" else hidden)[:, :-1]  # h_0 … h_{L-2}
    embedded = w["model.embed_tokens.weight"][tokens[:, 1:-1]]  # tokens 1 … L-1
    joined = [rms_norm(embedded, w[prefix + "enorm.weight"], eps), rms_norm(state, w[prefix + "hnorm.weight"], eps)]
    x = block(c, w, layer, torch.cat(joined, dim=-1) @ w[prefix + "eh_proj.weight"].T, records)
    return logits, rms_norm(x, w[prefix + "shared_head.norm.weight"], eps) @ w["lm_head.weight"].T, records


def take_copies(c, weights):
    """Drop the MTP layer's copies of the embedding and the head, after seeing that they are copies."""
    if c.get("num_nextn_predict_layers", 0) > 1:
        raise SystemExit(f"MTP depth 1 only, not {c['num_nextn_predict_layers']}")
    prefix = f"model.layers.{c['num_hidden_layers']}."
    for copy, main in [("embed_tokens.weight", "model.embed_tokens.weight"), ("shared_head.head.weight", "lm_head.weight")]:
        held = weights.pop(prefix + copy, None)
        if held is None and c.get("num_nextn_predict_layers"):
            raise SystemExit(f"{prefix}{copy} is missing from the export")
        if held is not None and not torch.equal(held, weights[main]):
            raise SystemExit(f"{prefix}{copy} differs from {main}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--lambda", type=float, default=0.3, dest="mtp_weight")
    parser.add_argument("--alpha", type=float, default=1e-4)
    parser.add_argument("--mtp-input", choices=["post", "pre"], default="post")
    args = parser.parse_args()
    torch.set_num_threads(1)

    c = read_config(args.export)
    weights = read_weights(args.export)
    take_copies(c, weights)
    weights = {name: tensor.double() for name, tensor in weights.items()}
    parameters = {name: w.requires_grad_() for name, w in weights.items() if not name.endswith("e_score_correction_bias")}
    tokens = read_tokens(args.input)

    logits, mtp_logits, records = forward(c, weights, tokens, args.mtp_input)
    zero = torch.zeros((), dtype=torch.float64)
    main_loss = cross_entropy(logits, tokens[:, 1:])
    mtp_loss = zero if mtp_logits is None else cross_entropy(mtp_logits, tokens[:, 2:])
    balance = sum((record["balance"] for record in records.values()), zero)
    loss = main_loss + args.mtp_weight * mtp_loss + args.alpha * balance
    loss.backward()

    results = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in parameters.items()}
    margins = [min((r["margins"][i] for r in records.values()), default=float("inf")) for i in range(3)]
    for name, margin in zip([".experts", ".groups", ".unbiased", ""], [*margins, min(margins)]):
        results["routing_margin" + name] = torch.tensor(margin, dtype=torch.float64)
    for layer, record in records.items():
        results |= {f"routes.{layer}": record["routes"], f"counts.{layer}": record["counts"]}
    results |= {"loss": loss, "loss.main": main_loss, "loss.mtp": mtp_loss, "loss.balance": balance, "logits": logits}
    if mtp_logits is not None:
        results["logits.mtp"] = mtp_logits
    write_results(args.output, results)
    print(json.dumps({name: results[name].item() for name in ("loss", "loss.main", "loss.mtp", "loss.balance")}))


if __name__ == "__main__":
    main()
