"""A picture of one step from the Chrome traces of its ranks: kernels above, copies between GPUs below, and how much of the
copies lies under kernels.

    timeline.py OUT.svg TRACE.json…
"""
import json
import sys
from pathlib import Path

WIDTH, ROW, LEFT = 1600, 26, 90


def events(path):
    """(start, end) in µs of kernels and of copies between GPUs."""
    kernels, copies = [], []
    for event in json.loads(Path(path).read_text())["traceEvents"]:
        span = (event.get("ts", 0), event.get("ts", 0) + event.get("dur", 0))
        if event.get("cat") == "kernel":
            kernels.append(span)
        elif event.get("cat") == "gpu_memcpy" and ("PtoP" in event["name"] or "Peer" in event["name"]):
            copies.append(span)
    return sorted(kernels), sorted(copies)


def merged(spans):
    out = []
    for start, end in spans:
        if out and start <= out[-1][1]:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([start, end])
    return out


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


def draw(traces, out):
    ranks = [tuple(map(merged, events(path))) for path in traces]
    spans = [span for rank in ranks for list_ in rank for span in list_]
    if not spans:
        return print("  no trace to draw")
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    scale = (WIDTH - LEFT) / (last - first)
    parts, y = [], 20
    for number, (kernels, copies) in enumerate(ranks):
        hidden = covered(copies, kernels) / max(sum(end - start for start, end in copies), 1e-9)
        print(f"  rank {number}: {sum(e - s for s, e in copies) / 1e3:.2f} ms of copies to other GPUs, {hidden:.0%} under kernels")
        for name, list_, colour in (("kernels", kernels, "#4477aa"), ("copies", copies, "#cc6677")):
            parts.append(f'<text x="4" y="{y + 17}" font-size="13">{number} {name}</text>')
            parts += [f'<rect x="{LEFT + (s - first) * scale:.2f}" y="{y}" width="{max((e - s) * scale, 0.2):.2f}" height="{ROW - 6}" fill="{colour}"/>' for s, e in list_]
            y += ROW
        y += 8
    parts.append(f'<text x="{LEFT}" y="{y + 14}" font-size="13">{(last - first) / 1e3:.1f} ms</text>')
    Path(out).write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 24}" font-family="sans-serif">{"".join(parts)}</svg>\n')
    print(f"  drawn: {out}")


if __name__ == "__main__":
    draw(sys.argv[2:], sys.argv[1])
