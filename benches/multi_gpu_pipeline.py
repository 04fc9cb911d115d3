"""Pipelines of four GPUs and more, for multi_gpu.py: one V3-sized MoE layer a stage, the first dense, 16 experts a GPU.

The vocabulary is small, so that stages are alike and a bubble is a bubble: with V3's, the last stage's head would be most of
it. A rank of DualPipe holds two stages, at most 1.9B parameters: some 22 GB of weights, gradients and its half of masters
and moments, and some 1 GB for each micro-batch in flight, P + 1 of them.

Work: what a rank computes in a step, from the times of one stage alone over the same experts (bench --stage): a forward F, a
backward B, its weights' part W, a forward and a backward overlapped FB. Bubble: what a step takes beyond that, so also what
stages do not have alike, and gradients' way to their owners after the last backward. Formula (DeepSeek-V3, table 2): 1F1B (P−1)(F+B), ZB1P
(P−1)(F+B−2W), DualPipe (P/2−1)(FB+B−3W).
"""
from pathlib import Path

from timeline import draw

SCHEDULES = ("1f1b", "zb1p", "dualpipe")
VOCAB = 2048
# Micro-batches; longer steps' traces take longer to read than the steps to make.
TRACED = 16


def settings(layers, ep, micro_batches):
    return (f"--set model.vocab_size={VOCAB} --set model.num_hidden_layers={layers} --set parallel.ep={ep} --set model.n_routed_experts={16 * ep} "
            f"--set phase.0.batch={micro_batches * ep}")


def traced(row):
    trace = row.get("trace")
    return f"{trace['idle']:7.1%}{trace['idle_most']:7.1%}{trace['all']['hidden'] or 0:8.0%}" if trace else f"{'':22}"


def pipeline(bench, pp, ep):
    ranks = pp * ep
    stage = bench.ours(f"stage ep {ep}", ep, f"{settings(1, ep, 4)} --set model.first_k_dense_replace=0", "--stage")
    if not stage:
        return
    part = {key.removesuffix("_ms"): value for key, value in stage["stage"].items()}
    alone = part["forward"] + part["backward"]
    print(f"\npp {pp} × ep {ep}; a stage: F {part['forward']:.2f}, B {part['backward']:.2f} (input {part['input']:.2f} + W {part['weight']:.2f}), FB {part['pair']:.2f} ms")
    print(f"  {'':24}{'M':>4}{'fwd+bwd':>9}{'foreseen':>10}{'of F+B':>8}{'bubble':>8}{'formula':>9}{'bubble':>8}{'formula':>9}{'idle':>7}{'worst':>7}{'hidden':>8}{'peak':>7}{'× rival':>9}")
    for count in (2 * pp, 4 * pp):
        rival = bench.rival(f"rival pp {pp} ep {ep} {count}", ranks, f"pp:1F1B --ep {ep} --micro-batches {count} --layers {pp} --vocab {VOCAB} --rounds 3")
        if rival:
            print(f"  {'torchtitan 1F1B':24}{count:4}{rival['fwd_bwd_ms']:9.1f}")
        for schedule in SCHEDULES:
            name = f"pp {pp} ep {ep} {schedule} {count}"
            row = bench.ours(name, ranks, f"{settings(pp, ep, count)} --set parallel.pp={pp} --set parallel.schedule={schedule}", steps=3, trace=count <= TRACED)
            if not row:
                print(f"  {schedule:24}{count:4} failed")
                continue
            foreseen, took = stage["steps"][f"{schedule} {pp} {count}"], row["fwd_bwd_ms"]
            row["bubble_ms"], row["foreseen"] = took - foreseen["work_ms"], foreseen
            print(f"  {schedule:24}{count:4}{took:9.1f}{foreseen['step_ms']:10.1f}{count * alone / took:8.2f}{row['bubble_ms']:8.1f}{foreseen['formula_ms']:9.1f}"
                  f"{row['bubble_ms'] / took:8.1%}{foreseen['formula_ms'] / foreseen['step_ms']:9.1%}{traced(row)}"
                  f"{(row['memory']['peak'] + row['memory']['buffers']) / 2**30:7.1f}" + (f"{rival['fwd_bwd_ms'] / took:9.2f}" if rival else ""), flush=True)
            if schedule == "dualpipe" and count == 2 * pp and ep == 1 and bench.args.timeline:
                draw(row["traces"], Path(bench.args.timeline).with_suffix(".pp.svg"))


def pipelines(bench, ranks):
    print("\npipelines, one MoE layer a stage, the first dense; milliseconds, as a step was and as its stages alone foretell; M (F + B) over it; bubble: step − work,")
    print("and by formula, both also of the step; GPUs idle from the update to the last weights' gradient, on average and most; transfers hidden; GiB")
    dense = bench.ours("stage dense", 1, settings(1, 1, 4), "--stage")
    if dense:
        print(f"the dense layer, first of all: F {dense['stage']['forward_ms']:.2f}, B {dense['stage']['backward_ms']:.2f} ms")
    for pp, ep in ((ranks, 1), (ranks // 2, 2)):
        pipeline(bench, pp, ep)
