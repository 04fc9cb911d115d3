"""What the oracles share: reading an exported folder, writing results, the routing margin.

An export is a folder with config.json and *.safetensors in DeepSeek's released layout: one tensor per expert,
the MTP block as model.layers.{num_hidden_layers}.*.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def read_config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def read_weights(folder):
    """Every tensor of every *.safetensors of the folder, under its name on disk."""
    weights = {}
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{folder}: no *.safetensors")
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                if name in weights:
                    raise SystemExit(f"{file.name}: {name} is in two files")
                weights[name] = handle.get_tensor(name)
    return weights


def read_tokens(path):
    """tokens: [B, L+1] i64. Inputs are the first L of a row, targets the last L."""
    tokens = load_file(path)["tokens"]
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[1] < 2:
        raise SystemExit(f"{path}: tokens must be int64 [B, L+1], is {tokens.dtype} {list(tokens.shape)}")
    return tokens


def write_results(path, results):
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in results.items()}, path)


def gap_after(scores, k):
    """Smallest lead, over the rows of [N, E], of the k-th best score over the next: inf if nothing is left out."""
    if k >= scores.shape[-1]:
        return float("inf")
    best = scores.topk(k + 1, dim=-1).values
    gap = best[:, k - 1] - best[:, k]
    return gap[best[:, k] > -torch.inf].min().item() if (best[:, k] > -torch.inf).any() else float("inf")


def routing_margin(config, scores, bias):
    """(experts, groups): how far the nearest route is from flipping. scores [N, E] unbiased, bias [E] or None.

    A flip of either kind changes which weights a token meets, so rounding alone can then change loss and gradients.
    """
    biased = scores if bias is None else scores + bias
    num_groups, kept = group_limit(config)
    groups = float("inf")
    if kept < num_groups:
        by_group = biased.unflatten(-1, (num_groups, -1))
        group_scores = by_group.amax(-1) if bias is None else by_group.topk(2, dim=-1).values.sum(-1)
        groups = gap_after(group_scores, kept)
        chosen = torch.zeros_like(group_scores, dtype=torch.bool)
        chosen.scatter_(-1, group_scores.topk(kept, dim=-1).indices, True)
        biased = by_group.masked_fill(~chosen.unsqueeze(-1), -torch.inf).flatten(-2)
    return gap_after(biased, config["num_experts_per_tok"]), groups


def group_limit(config):
    """(n_group, topk_group) as the gate uses them; the softmax gate has groups only where topk_method says so."""
    if config["model_type"] == "deepseek_v2" and config.get("topk_method", "greedy") == "greedy":
        return 1, 1
    return config.get("n_group") or 1, config.get("topk_group") or 1
