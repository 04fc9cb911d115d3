"""A training step of V3's widths on several GPUs of one host as a PyTorch user has it: torchtitan's DeepSeek-V3 through its
own parallelisation, BF16, fused AdamW.

    torchrun --standalone --nproc-per-node N benches/rivals/step_multi.py LAYOUT
        [--ep E] [--micro-batches M] [--layers L] [--vocab V] [--eager]

LAYOUT: one, ep, fsdp, ddp, or pp:SCHEDULE (1F1B; ZBVZeroBubble and DualPipeV take no compiled stages, so --eager). Experts
grow with ep, 16 a GPU: all GPUs share them out under ep, E of them otherwise, which leaves N / E to a pipeline. 4096 tokens
a GPU and micro-batch. With --vocab the vocabulary is small enough for every stage to have as many layers. Rank 0 prints one JSON line: median milliseconds of forward +
backward and of the whole step on the slowest rank, and its peak GiB. Needs Hopper GPUs and
    pip install torch==2.11.0 torchtitan==0.2.2 torchao==0.17.0
"""
import argparse
import json
import os
import tomllib
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.models.deepseek_v3 import parallelize_deepseekv3
from torchtitan.models.deepseek_v3.model.args import DeepSeekV3ModelArgs
from torchtitan.models.deepseek_v3.model.model import DeepSeekV3Model
from torchtitan.models.moe import MoEArgs

MODEL = Path(__file__).resolve().parents[2] / "configs/model/v3-slice.toml"
LENGTH = 4096


def model_args(config, layers, ep):
    experts = MoEArgs(
        num_experts=config["n_routed_experts"] * ep, num_shared_experts=config["n_shared_experts"], top_k=config["num_experts_per_tok"],
        score_func="sigmoid", route_norm=True, route_scale=config["routed_scaling_factor"], score_before_experts=False,
        _debug_force_load_balance=True,
    )
    args = DeepSeekV3ModelArgs(
        vocab_size=config["vocab_size"], dim=config["hidden_size"], inter_dim=config["intermediate_size"],
        moe_inter_dim=config["moe_intermediate_size"], n_layers=layers, n_dense_layers=config["first_k_dense_replace"],
        n_heads=config["num_attention_heads"], max_seq_len=LENGTH, moe_args=experts, q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"], qk_nope_head_dim=config["qk_nope_head_dim"], qk_rope_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
    )
    args.moe_impl = "standard"  # 0.2.2 reads it and does not declare it
    return args


def job(options, pp, ep):
    config = JobConfig()
    config.compile.enable, config.compile.components = not options.eager, ["model"]
    config.activation_checkpoint.mode = "none"
    config.parallelism.fsdp_reshard_after_forward = "never"
    config.training.seq_len, config.training.local_batch_size = LENGTH, options.micro_batches if pp > 1 else 1
    config.training.mixed_precision_param = config.training.mixed_precision_reduce = "bfloat16"
    config.parallelism.pipeline_parallel_degree, config.parallelism.pipeline_parallel_microbatch_size = pp, 1
    config.parallelism.expert_parallel_degree = ep
    if options.vocab:
        config.parallelism.pipeline_parallel_first_stage_less_layers = config.parallelism.pipeline_parallel_last_stage_less_layers = 0
    if pp > 1:
        config.parallelism.pipeline_parallel_schedule = options.layout.split(":")[1]
    return config


def loss_of(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("layout")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--ep", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
    torch.cuda.set_device(device)
    dist.init_process_group("nccl")
    torch.manual_seed(0)
    torch._dynamo.config.capture_scalar_outputs = True  # experts' row counts
    kind = options.layout.split(":")[0]
    ep = options.ep or (world if kind == "ep" else 1)
    pp = world // ep if kind == "pp" else 1
    config = tomllib.loads(MODEL.read_text())
    config["vocab_size"] = options.vocab or config["vocab_size"]
    args, jobs = model_args(config, options.layers or config["num_hidden_layers"], ep), job(options, pp, ep)
    shards = {"ep": world, "fsdp": world, "pp": ep}.get(kind, 1)
    dims = ParallelDims(dp_replicate=world if kind == "ddp" else 1, dp_shard=shards, cp=1, tp=1, pp=pp, ep=ep, etp=1, world_size=world)
    with torch.device("meta"):
        model = DeepSeekV3Model(args).to(torch.bfloat16)
    schedule, first, last = None, True, True
    if pp > 1:
        schedule, parts, first, last = pipeline_llm(model, dims, jobs, device, args, parallelize_deepseekv3, loss_of)
    elif kind == "one" and options.eager:
        parts = [model]
    else:
        parts = [parallelize_deepseekv3(model, dims, jobs) or model]
    for part in parts:
        part.to_empty(device=device)
        with torch.no_grad():
            getattr(part, "module", part).init_weights(buffer_device=device)
    optimizer = torch.optim.AdamW([p for part in parts for p in part.parameters()], lr=1e-4, fused=True)
    tokens = torch.randint(0, args.vocab_size, (options.micro_batches if pp > 1 else 1, LENGTH + 1), device=device)
    if pp > 1:
        dist.broadcast(tokens, 0)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def gradients():
        if schedule is None:
            for _ in range(options.micro_batches):
                loss_of(parts[0](inputs), targets).backward()
        else:
            extra = dict(target=targets, losses=[]) if last else {}
            schedule.step(*([inputs] if first else []), **extra)

    def step():
        gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def timed(work, warm=2):
        times = []
        for round in range(options.rounds + warm):
            optimizer.zero_grad(set_to_none=True)  # as ours: a step's first gradients are added to nothing
            dist.barrier()
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            if round >= warm:
                times.append(start.elapsed_time(end))
        slowest = torch.tensor(sorted(times)[len(times) // 2], device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return slowest.item()

    step()
    whole = timed(step)
    found = {"layout": options.layout, "ranks": world, "eager": options.eager, "micro_batches": options.micro_batches, "step_ms": whole, "fwd_bwd_ms": timed(gradients)}
    if rank == 0:
        print(json.dumps(found | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
