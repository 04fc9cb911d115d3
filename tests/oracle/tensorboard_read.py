"""A run's TensorBoard folder as the real `tensorboard` package reads it, held against the run's JSONL.

    tensorboard_read.py RUN_DIR

Prints JSON, {tag: [[step, value], …]}, as TensorBoard draws them. Tag `train/X` is key X of log/rank-0.jsonl, any other `a/b` is key a_b. Exits 1,
saying what differs on stderr, unless every tag has a point at exactly the steps whose JSONL line has its key, with the same
value (TensorBoard's are f32).
"""

import json
import math
import struct
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_events(folder):
    """{tag: {step: value}} over all event files. A point that a resume has made again must be there once, and no line go back."""
    points, events = {}, EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for tag in sorted(events.Tags()["scalars"]):
        steps = [event.step for event in events.Scalars(tag)]
        if any(a >= b for a, b in zip(steps, steps[1:])):
            sys.exit(f"{tag}: the steps go back: {steps}")
        points[tag] = {event.step: event.value for event in events.Scalars(tag)}
    return points


def read_jsonl(path):
    """{key: {step: value}}: a step's lines (training, validation) add up, a later line for a key wins."""
    series = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        for key, value in record.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                series.setdefault(key, {})[record["step"]] = value
    return series


def key_of(tag):
    return tag.removeprefix("train/").replace("/", "_")


def as_f32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


def differences(points, series):
    for tag, steps in points.items():
        expected = series.get(key_of(tag))
        if expected is None:
            yield f"{tag}: no key {key_of(tag)} in the JSONL"
            continue
        if steps.keys() != expected.keys():
            yield f"{tag}: only in TensorBoard {sorted(steps.keys() - expected.keys())}, only in the JSONL {sorted(expected.keys() - steps.keys())}"
        for step in steps.keys() & expected.keys():
            if steps[step] != as_f32(expected[step]) and not (math.isnan(steps[step]) and math.isnan(expected[step])):
                yield f"{tag} at step {step}: {steps[step]!r} is not {expected[step]!r}"


def main():
    run_dir = Path(sys.argv[1])
    points = read_events(run_dir / "tensorboard")
    found = list(differences(points, read_jsonl(run_dir / "log" / "rank-0.jsonl")))
    if not points:
        found.append(f"no scalars in {run_dir / 'tensorboard'}")
    print(json.dumps({tag: list(steps.items()) for tag, steps in points.items()}))
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
