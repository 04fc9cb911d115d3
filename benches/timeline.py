"""What the Chrome traces of a run's ranks say about transfers between GPUs, and a picture of them.

    timeline.py OUT.svg TRACE.json…

`bench --trace` traces two steps. Everything here is of the second one, from the first one's update, so that the weights'
way after an update is in it. A transfer is a copy to another GPU or a kernel of NCCL's; it is hidden where another kernel
runs on the GPU that sends.
"""
import gzip
import json
import sys
from collections import defaultdict
from pathlib import Path

WIDTH, ROW, LEFT = 1600, 26, 90
UPDATE = "adamw"
# The loss: the weights of the whole model have arrived, and no gradient has left.
LOSS = "cross_entropy"
# In every layer's backward, and last in it.
LAYER = "gemm_wgrad"


class Trace:
    """Of a rank, in µs: kernels (start, end, name), transfers (start, end, bytes, stream), both in order."""

    def __init__(self, path):
        path = Path(path)
        text = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
        self.kernels, self.transfers = [], []
        for event in json.loads(text)["traceEvents"]:
            start, args = event.get("ts", 0), event.get("args", {})
            span, name = (start, start + event.get("dur", 0)), event.get("name", "")
            if event.get("cat") == "kernel" and name.startswith("nccl"):
                self.transfers.append((*span, 0, args.get("stream")))
            elif event.get("cat") == "kernel":
                self.kernels.append((*span, name))
            elif event.get("cat") == "gpu_memcpy" and "PtoP" in name:
                self.transfers.append((*span, args.get("bytes", 0), args.get("stream")))
        self.kernels.sort()
        self.transfers.sort(key=lambda transfer: transfer[:2])

    def named(self, *names):
        return [(start, end) for start, end, name in self.kernels if name.startswith(names)]

    def steps(self):
        """Updates, (start, end), one a step: gradients lie between two of them, and none within one."""
        found, begin = [], [start for start, _ in self.named(LAYER)]
        for start, end in self.named(UPDATE):
            if found and not any(found[-1][1] < at < start for at in begin):
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
        return found


def merged(spans):
    out = []
    for start, end, *_ in spans:
        if out and start <= out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([start, end])
    return out


def within(spans, window):
    start, end = window
    return [(max(span[0], start), min(span[1], end), *span[2:]) for span in spans if span[1] > start and span[0] < end]


def length(spans):
    return sum(end - start for start, end in merged(spans))


def covered(spans, by):
    """µs of `spans` that lie inside `by`; both merged."""
    total, at = 0.0, 0
    for start, end in spans:
        while at < len(by) and by[at][1] <= start:
            at += 1
        other = at
        while other < len(by) and by[other][0] < end:
            total += min(end, by[other][1]) - max(start, by[other][0])
            other += 1
    return total


def shares(trace, transfers):
    """Of these transfers of a rank: milliseconds during which any is under way, and of them with no kernel beside; bytes."""
    spans = merged(transfers)
    total = length(spans)
    return {"ms": total / 1e3, "exposed_ms": (total - covered(spans, merged(trace.kernels))) / 1e3, "bytes": sum(t[2] for t in transfers)}


def mean(parts):
    """Over ranks; the hidden share is of all their milliseconds."""
    out = {key: sum(part[key] for part in parts) / len(parts) for key in parts[0]}
    return out | {"hidden": 1 - out["exposed_ms"] / out["ms"] if out["ms"] else None}


def windows(traces):
    """Of the second step, or of a single one: (its cycle from update to update, its gradients, its pipeline), each of every rank.
    A rank's gradients are what lies between two updates. The pipeline is at work on all ranks from the last one's update to the
    last weights' gradient of any."""
    cycles, gradients = [], []
    for trace in traces:
        updates, first = trace.steps(), trace.kernels[0][0]
        begin, start = updates[-2] if len(updates) > 1 else (first, first)
        end = updates[-1][0] if updates else trace.kernels[-1][1]
        cycles.append((begin, end))
        gradients.append((start, end))
    last = max((end for trace, (_, to) in zip(traces, gradients) for _, end in trace.named(LAYER) if end <= to), default=0)
    pipeline = (max(start for start, _ in gradients), last or max(end for _, end in gradients))
    return cycles, gradients, pipeline


def measure(paths):
    """A table's figures of these traces, one a rank; means over ranks."""
    traces = [Trace(path) for path in paths]
    cycles, gradients, pipeline = windows(traces)
    found, parts = {}, defaultdict(list)
    for trace, cycle, gradient in zip(traces, cycles, gradients):
        loss = next((start for start, _ in trace.named(LOSS) if start > gradient[0]), None)
        inside = within(trace.transfers, cycle)
        parts["all"].append(shares(trace, inside))
        parts["gradients"].append(shares(trace, within(trace.transfers, gradient)))
        if loss:
            parts["gather"].append(shares(trace, [t for t in inside if t[0] < loss]))
            parts["reduce"].append(shares(trace, [t for t in inside if t[0] >= loss]))
        # Experts' rows are what still travels in the middle of a step of several micro-batches: gathers are over, sums not begun.
        third = (gradient[1] - gradient[0]) / 3
        rows = {t[3] for t in within(trace.transfers, (gradient[0] + third, gradient[1] - third))}
        parts["middle"].append(shares(trace, [t for t in within(trace.transfers, gradient) if t[3] in rows]))
        parts["idle"].append(1 - length(within(trace.kernels, pipeline)) / (pipeline[1] - pipeline[0]))
    idle = parts.pop("idle")
    found = {name: mean(ranks) for name, ranks in parts.items()}
    return found | {"idle": sum(idle) / len(idle), "idle_most": max(idle), "pipeline_ms": (pipeline[1] - pipeline[0]) / 1e3}


def draw(paths, out):
    """The second step's gradients: kernels above, transfers below, for each rank."""
    traces = [Trace(path) for path in paths]
    if not any(trace.kernels for trace in traces):
        return print("  no trace to draw")
    _, gradients, _ = windows(traces)
    first, last = min(start for start, _ in gradients), max(end for _, end in gradients)
    scale = (WIDTH - LEFT) / (last - first)
    parts, y = [], 20
    for number, trace in enumerate(traces):
        for name, spans, colour in (("kernels", trace.kernels, "#4477aa"), ("copies", trace.transfers, "#cc6677")):
            parts.append(f'<text x="4" y="{y + 17}" font-size="13">{number} {name}</text>')
            spans = merged(within(spans, (first, last)))
            parts += [f'<rect x="{LEFT + (s - first) * scale:.2f}" y="{y}" width="{max((e - s) * scale, 0.2):.2f}" height="{ROW - 6}" fill="{colour}"/>' for s, e in spans]
            y += ROW
        y += 8
    parts.append(f'<text x="{LEFT}" y="{y + 14}" font-size="13">{(last - first) / 1e3:.1f} ms</text>')
    Path(out).write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 24}" font-family="sans-serif">{"".join(parts)}</svg>\n')
    print(f"  drawn: {out}")


if __name__ == "__main__":
    draw(sys.argv[2:], sys.argv[1])
    print(json.dumps(measure(sys.argv[2:]), indent=1))
