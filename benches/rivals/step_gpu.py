"""A training step of V3's widths at three layers (configs/model/v3-slice.toml) as a PyTorch user has it: torchtitan's
DeepSeek-V3, each layer compiled, BF16 parameters, fused AdamW; the step also with FP32 masters beside the parameters.

    python3 benches/rivals/step_gpu.py [--tokens 4096] [--eager] [--fp8]

Prints one JSON line: median milliseconds of forward + backward and of the whole step, and peak GiB. Needs a Hopper GPU and
    pip install torch==2.11.0 torchtitan==0.2.2 torchao==0.17.0
"""
import argparse
import json
import tomllib
from pathlib import Path

import torch
from torch.nn import functional as F

MODEL = Path(__file__).resolve().parents[2] / "configs/model/v3-slice.toml"


def build(config, length, fp8):
    from torchtitan.models.deepseek_v3.model.args import DeepSeekV3ModelArgs
    from torchtitan.models.deepseek_v3.model.model import DeepSeekV3Model
    from torchtitan.models.moe import MoEArgs

    experts = MoEArgs(
        num_experts=config["n_routed_experts"], num_shared_experts=config["n_shared_experts"], top_k=config["num_experts_per_tok"],
        score_func="sigmoid", route_norm=True, route_scale=config["routed_scaling_factor"], score_before_experts=False,
    )
    args = DeepSeekV3ModelArgs(
        vocab_size=config["vocab_size"], dim=config["hidden_size"], inter_dim=config["intermediate_size"],
        moe_inter_dim=config["moe_intermediate_size"], n_layers=config["num_hidden_layers"],
        n_dense_layers=config["first_k_dense_replace"], n_heads=config["num_attention_heads"], max_seq_len=length, moe_args=experts,
        q_lora_rank=config["q_lora_rank"], kv_lora_rank=config["kv_lora_rank"], qk_nope_head_dim=config["qk_nope_head_dim"],
        qk_rope_head_dim=config["qk_rope_head_dim"], v_head_dim=config["v_head_dim"],
    )
    args.moe_impl = "standard"  # 0.2.2 reads it and does not declare it
    with torch.device("cuda"):
        model = DeepSeekV3Model(args)
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cuda"))
    model = model.to(torch.bfloat16)
    if fp8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        wanted = lambda module, name: isinstance(module, torch.nn.Linear) and name != "output" and "router" not in name
        model = convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name("rowwise"), module_filter_fn=wanted)
    return model


def median_ms(work, rounds=12, warm=3, before=lambda: None):
    times = []
    for round in range(rounds + warm):
        before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if round >= warm:
            times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def step_with_masters(parameters, gradients):
    """As `step`, AdamW over FP32 copies of the parameters, to which the gradients are widened. None: it does not fit."""
    try:
        masters = [parameter.detach().float() for parameter in parameters]
        optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)

        def step():
            gradients()
            for master, parameter in zip(masters, parameters):
                master.grad, parameter.grad = parameter.grad.float(), None
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_copy_([parameter.data for parameter in parameters], masters)

        return median_ms(step)
    except torch.OutOfMemoryError:
        return None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--fp8", action="store_true", help="torchao's rowwise FP8 for the linears")
    args = parser.parse_args()
    torch.manual_seed(0)
    config = tomllib.loads(MODEL.read_text())
    model = build(config, args.tokens, args.fp8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if not args.eager:
        torch._dynamo.config.capture_scalar_outputs = True
        for name, layer in model.layers.items():
            model.layers[name] = torch.compile(layer, fullgraph=False)
    ids = torch.randint(0, config["vocab_size"], (1, args.tokens + 1), device="cuda")

    def gradients():
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()

    def step():
        gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    whole = median_ms(step)
    peak = torch.cuda.max_memory_allocated() / 2**30
    # As ours: a step's first gradients are added to nothing.
    alone = median_ms(gradients, before=lambda: model.zero_grad(set_to_none=True))
    del optimizer
    masters = step_with_masters(list(model.parameters()), gradients)
    name = "torchtitan 0.2.2" + (" eager" if args.eager else " compiled") + (" + torchao rowwise FP8" if args.fp8 else "")
    print(json.dumps({"name": name, "fwd_bwd_ms": alone, "step_ms": whole, "step_masters_ms": masters, "peak_gib": peak, "device": torch.cuda.get_device_name()}))


if __name__ == "__main__":
    main()
