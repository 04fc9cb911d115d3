"""transformers' own training step of a DeepSeek-V3 (or V2) model on the CPU: forward, backward, clip, AdamW, in f32.

    train_cpu.py CONFIG [--batch N] [--micro-batch N] [--length N] [--threads N] [--steps N]

CONFIG is a config.json as transformers reads it, or one of our run configs (configs/run/*.toml), whose first phase then
gives batch, micro-batch and length. The model is the same either way, but without MTP and balance loss, which transformers
does not train. It gets its best: fused AdamW, and whichever of its expert and attention implementations is fastest here,
each tried for a few steps (--experts, --attention: only that one). Prints JSON with the median step's tokens_per_s.
"""

import argparse
import json
import os
import statistics
import sys
import time
import tomllib
from pathlib import Path


def released_config(model):
    """Our model file's keys are DeepSeek's own; this adds what transformers wants said besides."""
    sigmoid = model.get("scoring_func", "sigmoid") == "sigmoid"
    c = {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "norm_topk_prob": sigmoid} | model
    c |= {"num_key_value_heads": c["num_attention_heads"], "num_nextn_predict_layers": 0, "bos_token_id": 0, "eos_token_id": 0}
    c["model_type"] = "deepseek_v3" if sigmoid else "deepseek_v2"
    c["topk_method"] = "noaux_tc" if sigmoid else "greedy" if c["n_group"] == 1 else "group_limited_greedy"
    if "rope_scaling" in c:
        c["rope_scaling"] = c["rope_scaling"] | {"rope_type": "yarn"}
    return c


def read(path):
    """(config.json's keys, the first phase or nothing)"""
    if path.suffix == ".json":
        return json.loads(path.read_text()), {}
    run = tomllib.loads(path.read_text())
    model = run["model"]
    if isinstance(model, str):
        model = tomllib.loads((path.parent / model).read_text())
    return released_config(model), run["phase"][0]


class Rival:
    def __init__(self, config, args, experts, attention):
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(1)
        model_type = config["model_type"]
        known = AutoConfig.for_model(model_type, **{k: v for k, v in config.items() if k != "model_type"})
        self.model = AutoModelForCausalLM.from_config(
            known, dtype=torch.float32, attn_implementation=attention, experts_implementation=experts
        )
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.args, self.vocab, self.count = args, config["vocab_size"], 0
        self.torch = torch

    def tokens(self, index):
        """The ids of `tiefsee bench`."""
        shape = self.args.micro_batch, self.args.length + 1
        ids = self.torch.arange(shape[0] * shape[1]) * 7919 + self.count * 104729 + index * 1299709
        return (ids % self.vocab).view(shape)

    def step(self):
        """(seconds, loss)"""
        micro_batches = self.args.batch // self.args.micro_batch
        batches = [self.tokens(index) for index in range(micro_batches)]
        self.count += 1
        start, total = time.perf_counter(), 0.0
        for tokens in batches:
            logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = self.torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) / micro_batches
            loss.backward()
            total += loss.item()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start, total


def fastest(config, args):
    """The implementations to time, and each candidate's best of 2 steps after one that is not counted (that one alone
    where it is already hopeless: batched_mm is made for decoding)."""
    tried = {}
    for experts in [args.experts] if args.experts else ["eager", "grouped_mm", "batched_mm"]:
        for attention in [args.attention] if args.attention else ["sdpa", "eager"]:
            try:
                rival = Rival(config, args, experts, attention)
                first = rival.step()[0]
                hopeless = first > 5 * min(tried.values(), default=first)
                tried[experts, attention] = first if hopeless else min(rival.step()[0] for _ in range(2))
            except (ValueError, RuntimeError, NotImplementedError) as error:
                print(f"{experts}/{attention} does not run here: {error}", file=sys.stderr)
    if not tried:
        sys.exit("no implementation runs")
    return min(tried, key=tried.get), tried


def in_ms(tried):
    return {"/".join(pair): round(seconds * 1e3, 1) for pair, seconds in tried.items()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    for option in ("--batch", "--micro-batch", "--length"):
        parser.add_argument(option, type=int)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--steps", type=int, default=8, help="timed, after two that are not")
    parser.add_argument("--experts", help="only this implementation")
    parser.add_argument("--attention", help="only this implementation")
    parser.add_argument("--search", action="store_true", help="only print which implementations are fastest")
    args = parser.parse_args()
    config, phase = read(args.config)
    args.batch = args.batch or phase.get("batch", 4)
    args.micro_batch = args.micro_batch or phase.get("micro_batch", args.batch)
    args.length = args.length or phase.get("sequence_length", 256)
    if args.batch % args.micro_batch:
        sys.exit(f"batch {args.batch} is not a multiple of micro-batch {args.micro_batch}")

    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    if args.experts and args.attention:
        experts, attention, tried = args.experts, args.attention, {}
    else:
        (experts, attention), tried = fastest(config, args)
    if args.search:
        print(json.dumps({"experts": experts, "attention": attention, "tried_step_ms": in_ms(tried)}))
        return
    rival = Rival(config, args, experts, attention)
    steps = [rival.step() for _ in range(args.steps + 2)][2:]
    seconds = statistics.median(seconds for seconds, _ in steps)
    result = {
        "tokens_per_s": args.batch * args.length / seconds,
        "step_ms": seconds * 1e3,
        "loss": steps[-1][1],
        "threads": torch.get_num_threads(),
        "experts": experts,
        "attention": attention,
        "tried_step_ms": in_ms(tried),
        "parameters": sum(p.numel() for p in rival.model.parameters()),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
