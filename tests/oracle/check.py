"""The oracles against themselves: tiny random exports of every variant, made by transformers, through hf.py.

    check.py [NAME...]

Shows, without any of our Rust, that an export in the layout documented here loads, and that hf.py, mtp.py and
transformers' own code agree. Prints a line for each check; exits 1 if one fails.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

HERE = Path(__file__).parent
TOKENS, VOCAB, LAYERS = 13, 61, 3


def config(kind, **changes):
    """A released config.json in small. The keys are those that an export must have."""
    base = {
        "model_type": kind, "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24,
        "num_hidden_layers": LAYERS, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 20, "kv_lora_rank": 12,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 16, "v_head_dim": 10,
        "n_routed_experts": 16, "n_shared_experts": 2, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2,
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "initializer_range": 0.02, "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 256,
        "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False, "use_cache": True,
        "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32",
    }  # fmt: skip
    if kind == "deepseek_v3":
        base |= {"architectures": ["DeepseekV3ForCausalLM"], "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        base |= {"rope_interleave": True, "num_nextn_predict_layers": 1}
    else:
        base |= {"architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "softmax", "topk_method": "greedy"}
        base |= {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}
    return base | changes


def yarn(**changes):
    scaling = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    return scaling | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0} | changes


VARIANTS = {  # name: config.json
    "v3": config("deepseek_v3"),
    "v3-no-q-latent": config("deepseek_v3", q_lora_rank=None),
    "v3-one-group": config("deepseek_v3", n_group=1, topk_group=1),
    "v3-no-dense": config("deepseek_v3", first_k_dense_replace=0),
    "v3-not-renormalised": config("deepseek_v3", norm_topk_prob=False),
    "v3-yarn": config("deepseek_v3", rope_scaling=yarn()),
    "v3-yarn-unequal": config("deepseek_v3", rope_scaling=yarn(mscale=1.0, mscale_all_dim=0.5)),
    "v2": config("deepseek_v2"),
    "v2-groups": config("deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2),
    "v2-no-q-latent-yarn": config("deepseek_v2", q_lora_rank=None, rope_scaling=yarn(mscale=0.707, mscale_all_dim=0.707)),
    "v2-scaled": config("deepseek_v2", routed_scaling_factor=1.7),
}


def block_shapes(c, prefix):
    """Names and shapes of one MoE block on disk, from the config alone."""
    d, heads, nope, rope = c["hidden_size"], c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    m, latent, q = c["moe_intermediate_size"], c["kv_lora_rank"], c["q_lora_rank"]
    shapes = {"input_layernorm": [d], "post_attention_layernorm": [d]}
    if q is None:
        shapes["self_attn.q_proj"] = [heads * (nope + rope), d]
    else:
        shapes |= {"self_attn.q_a_proj": [q, d], "self_attn.q_a_layernorm": [q]}
        shapes["self_attn.q_b_proj"] = [heads * (nope + rope), q]
    shapes |= {
        "self_attn.kv_a_proj_with_mqa": [latent + rope, d],
        "self_attn.kv_a_layernorm": [latent],
        "self_attn.kv_b_proj": [heads * (nope + c["v_head_dim"]), latent],
        "self_attn.o_proj": [d, heads * c["v_head_dim"]],
        "mlp.gate": [c["n_routed_experts"], d],
    }
    for mlp, width in [(f"mlp.experts.{e}", m) for e in range(c["n_routed_experts"])] + [
        ("mlp.shared_experts", m * c["n_shared_experts"])
    ]:
        shapes |= {f"{mlp}.gate_proj": [width, d], f"{mlp}.up_proj": [width, d], f"{mlp}.down_proj": [d, width]}
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def make_export(folder, c, seed):
    """transformers makes and saves the main model; the MTP block and the biases are drawn here."""
    folder.mkdir()
    torch.manual_seed(seed)
    (folder / "config.json").write_text(json.dumps(c))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in list(model.named_parameters()) + list(model.named_buffers()):
            if "norm" in name:
                tensor.copy_(1 + 0.2 * torch.randn_like(tensor))
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(0.05 * torch.randn_like(tensor))
            elif "inv_freq" not in name:
                tensor.copy_(torch.randn_like(tensor) * (1.0 if name.endswith("gate.weight") else 0.5) / math.sqrt(tensor.shape[-1]))
    model.save_pretrained(folder / "saved")
    weights = load_file(folder / "saved" / "model.safetensors")
    if c["model_type"] == "deepseek_v3" and c["num_nextn_predict_layers"]:
        prefix, d = f"model.layers.{c['num_hidden_layers']}.", c["hidden_size"]
        shapes = block_shapes(c, prefix)
        shapes |= {f"{prefix}{name}.weight": [d] for name in ("enorm", "hnorm", "shared_head.norm")}
        shapes[f"{prefix}eh_proj.weight"] = [d, 2 * d]
        for name, shape in shapes.items():
            noise = torch.randn(shape)
            weights[name] = 1 + 0.2 * noise if "norm" in name else 0.5 * noise / math.sqrt(shape[-1])
        weights[f"{prefix}mlp.gate.e_score_correction_bias"] = 0.05 * torch.randn(c["n_routed_experts"])
        weights[f"{prefix}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"{prefix}shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for file in (folder / "saved").iterdir():
        file.unlink()
    (folder / "saved").rmdir()
    return weights


def run(script, *args):
    done = subprocess.run([sys.executable, str(HERE / script), *map(str, args)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def distance(a, b):
    """‖a−b‖/‖b‖, 0/0 = 0."""
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm()).item() if b.norm() > 0 else a.norm().item()


def transformers_mtp(export, c, tokens):
    """MTP's loss with transformers' own MTP layer, fed as its decoding loop feeds it; None where it has none."""
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, attn_implementation="eager")
    mtp_config = model.config.get_mtp_config()
    layer = MtpLayer(mtp_config, v3.DeepseekV3DecoderLayer, v3.DeepseekV3RMSNorm, 0)
    prefix = f"model.layers.{c['num_hidden_layers']}."
    disk = {n.removeprefix(prefix): t for n, t in load_file(export / "model.safetensors").items() if n.startswith(prefix)}
    state = {"post_norm.weight": disk.pop("shared_head.norm.weight")}
    del disk["embed_tokens.weight"], disk["shared_head.head.weight"]
    experts = range(c["n_routed_experts"])
    take = lambda e, part: disk.pop(f"mlp.experts.{e}.{part}_proj.weight")
    state["mtp_block.mlp.experts.gate_up_proj"] = torch.stack([torch.cat([take(e, "gate"), take(e, "up")]) for e in experts])
    state["mtp_block.mlp.experts.down_proj"] = torch.stack([take(e, "down") for e in experts])
    state |= {n if n.split(".")[0] in ("enorm", "hnorm", "eh_proj") else f"mtp_block.{n}": t for n, t in disk.items()}
    layer.load_state_dict(state)

    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state[:, :-1]
    embedded = model.model.embed_tokens(tokens[:, 1:-1])
    positions = torch.arange(1, tokens.shape[1] - 1).unsqueeze(0)  # a shift that rotary attention does not see
    mask = torch.full((embedded.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    out = layer(embedded, hidden, model.model.rotary_emb(embedded, positions), mask, positions, None)
    return torch.nn.functional.cross_entropy(model.lm_head(out).flatten(0, 1), tokens[:, 2:].flatten())


def check_variant(name, c, folder):
    folder.mkdir()
    export, tokens_file = folder / "export", folder / "in.safetensors"
    make_export(export, c, seed=len(name))
    tokens = torch.randint(0, VOCAB, (2, TOKENS + 1))
    save_file({"tokens": tokens}, tokens_file)
    run("hf.py", export, tokens_file, folder / "hf.safetensors")
    hf = load_file(folder / "hf.safetensors")
    assert hf["logits"].shape == (2, TOKENS, VOCAB)

    # Main loss only: the two oracles have no code in common and must agree to f32 rounding on everything.
    run("mtp.py", export, tokens_file, folder / "main.safetensors", "--lambda", 0, "--alpha", 0)
    ours = load_file(folder / "main.safetensors")
    extra = ("loss", "logits", "routing_margin", "routes", "counts")
    gradients = [n for n in hf if not n.startswith(extra)]
    mtp_prefix = f"model.layers.{c['num_hidden_layers']}."
    assert {n for n in ours if not n.startswith((*extra, mtp_prefix))} == set(gradients)
    assert all(torch.equal(hf[n], ours[n]) for n in hf if n.startswith("routes"))
    worst = max(distance(hf[n], ours[n]) for n in gradients)
    logits = distance(hf["logits"], ours["logits"])
    line = f"{name}: loss {hf['loss'].item():.6f}, margin {hf['routing_margin'].item():.1e}, logits {logits:.1e}, worst gradient {worst:.1e}"
    assert logits < 1e-5 and worst < 1e-4 and distance(hf["loss"], ours["loss"]) < 1e-6, line

    # Everything on: the parts add up, and MTP equals transformers' own module.
    run("mtp.py", export, tokens_file, folder / "all.safetensors", "--lambda", 0.3, "--alpha", 0.01)
    full = load_file(folder / "all.safetensors")
    total = full["loss.main"] + 0.3 * full["loss.mtp"] + 0.01 * full["loss.balance"]
    assert torch.equal(total, full["loss"]) and full["loss.balance"] > 0
    layers = [n for n in full if n.startswith("counts.")]
    assert all(full[n].sum() in (2 * TOKENS * c["num_experts_per_tok"], 2 * (TOKENS - 1) * c["num_experts_per_tok"]) for n in layers)
    if c.get("num_nextn_predict_layers"):
        gap = distance(transformers_mtp(export, c, tokens), full["loss.mtp"])
        line += f", MTP {gap:.1e}"
        assert gap < 1e-6, line
    return line


def main():
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = sys.argv[1:] or list(VARIANTS)
    with tempfile.TemporaryDirectory() as temp:
        for name in names:
            print(check_variant(name, VARIANTS[name], Path(temp) / name), flush=True)


if __name__ == "__main__":
    main()
