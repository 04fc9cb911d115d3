"""The oracle: Hugging Face transformers' own DeepseekV3ForCausalLM / DeepseekV2ForCausalLM on our export.

    hf.py EXPORT_DIR INPUT.safetensors OUTPUT.safetensors [--dtype f32|f64]

INPUT holds `tokens` [B, L+1] i64. OUTPUT holds
    logits [B, L, V], loss [] (mean cross-entropy of the main head), routing_margin [],
    routing_margin.experts [], routing_margin.groups [],
    routes.{layer} [B*L, K] i64 (sorted) for each MoE layer,
    and the gradient of every parameter under its name on disk (experts one by one).
The last line of stdout is JSON with loss, margins and what was loaded.

`--dtype f64` is not f64 throughout: transformers computes RMSNorm, the gate, cos/sin and attention's softmax in f32.
Use mtp.py (f64 throughout, main loss included) where rounding must be told from mistakes.
"""

import argparse
import json
import re

import torch
import transformers
from transformers import AutoModelForCausalLM

from common import read_config, read_tokens, read_weights, routing_margin, write_results


def load(folder, dtype):
    """The model with transformers' own code and loader; anything missing, left over or of another shape is an error."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    mtp = f"model.layers.{model.config.num_hidden_layers}."
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith(mtp)]
    problems = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(unexpected),
        "mismatched": sorted(str(key) for key in info["mismatched_keys"]),
    }
    if any(problems.values()):
        raise SystemExit(f"{folder}: {type(model).__name__} does not load this export: {json.dumps(problems)}")
    return model.eval()


def watch_gates(model, config):
    """Record, at each gate's forward, its routes and its margin, from the very inputs that the gate sees."""
    seen = {}

    def hook(layer):
        def record(gate, inputs, outputs):
            x = inputs[0].detach().reshape(-1, gate.hidden_dim).float()
            logits = torch.nn.functional.linear(x, gate.weight.detach().float())
            bias = getattr(gate, "e_score_correction_bias", None)
            scores = logits.softmax(-1) if bias is None else logits.sigmoid()
            seen[layer] = (outputs[2].detach().sort(-1).values, routing_margin(config, scores, bias))

        return record

    for layer, block in enumerate(model.model.layers):
        if hasattr(block.mlp, "gate"):
            block.mlp.gate.register_forward_hook(hook(layer))
    return seen


def gradient(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def on_disk_names(model, value):
    """(name, value(parameter)): transformers packs a layer's experts in two tensors; the export has three per expert."""
    for name, parameter in model.named_parameters():
        packed = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if not packed:
            yield name, value(parameter)
            continue
        for expert, rows in enumerate(value(parameter)):
            if packed[2] == "down_proj":
                yield f"{packed[1]}.{expert}.down_proj.weight", rows
            else:
                gate, up = rows.chunk(2, dim=0)
                yield f"{packed[1]}.{expert}.gate_proj.weight", gate
                yield f"{packed[1]}.{expert}.up_proj.weight", up


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("export")
    parser.add_argument("input")
    parser.add_argument("output")
    parser.add_argument("--dtype", choices=["f32", "f64"], default="f32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    config = read_config(args.export)
    tokens = read_tokens(args.input)
    model = load(args.export, torch.float64 if args.dtype == "f64" else torch.float32)
    seen = watch_gates(model, config)

    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()

    experts = min((margin[0] for _, margin in seen.values()), default=float("inf"))
    groups = min((margin[1] for _, margin in seen.values()), default=float("inf"))
    results = dict(on_disk_names(model, gradient))

    mtp = f"model.layers.{model.config.num_hidden_layers}."
    expected = {name for name in read_weights(args.export) if not name.startswith(mtp)}
    expected -= {name for name in expected if name.endswith("e_score_correction_bias")}
    if set(results) != expected:
        raise SystemExit(f"names of gradients and of exported tensors differ: {sorted(set(results) ^ expected)}")

    results |= {f"routes.{layer}": routes for layer, (routes, _) in seen.items()}
    results |= {
        "logits": logits,
        "loss": loss,
        "routing_margin": torch.tensor(min(experts, groups), dtype=torch.float64),
        "routing_margin.experts": torch.tensor(experts, dtype=torch.float64),
        "routing_margin.groups": torch.tensor(groups, dtype=torch.float64),
    }
    write_results(args.output, results)
    summary = {
        "model": type(model).__name__,
        "transformers": transformers.__version__,
        "loss": loss.item(),
        "margin_experts": None if experts == float("inf") else experts,
        "margin_groups": None if groups == float("inf") else groups,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
