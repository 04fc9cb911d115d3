"""Reading packed samples of L + 1 tokens with document boundaries, as others do it, one process and one core a reader.

    data_read.py mmap     CORPUS             [--length N] [--tokens N]
    data_read.py datasets CORPUS --text DIR  [--length N] [--tokens N]

CORPUS is a folder that `tiefsee prepare` wrote; its tokens are what is read. `mmap` copies them into a Megatron-style
.bin of little-endian u32 and an .idx of document starts beside it (not timed), then reads shuffled samples through a
memory map. `datasets` streams DIR/*.parquet (column `text`) through Hugging Face datasets, shuffled with a buffer,
tokenised on the fly with CORPUS/tokenizer.json and packed. Prints JSON: tokens per CPU-second, peak memory that is not
the map's, time to the first sample after a stop in mid-corpus, and whether it is the sample an undisturbed run has there.
"""

import argparse
import glob
import itertools
import json
import os
import resource
import tempfile
import time

import numpy as np


def stream(corpus):
    """Every document of the train split as an array of u32, in stream order."""
    import pyarrow.parquet as pq

    for shard in sorted(glob.glob(os.path.join(corpus, "train-*.parquet"))):
        file = pq.ParquetFile(shard)
        for group in range(file.num_row_groups):
            for row in file.read_row_group(group, columns=["tokens"]).column("tokens"):
                yield np.frombuffer(row.as_buffer(), dtype="<u4")


class Mmap:
    def __init__(self, args, folder):
        self.length = args.length
        self.bin, self.idx = os.path.join(folder, "tokens.bin"), os.path.join(folder, "tokens.idx")
        if not os.path.exists(self.bin):
            starts, at = [], 0
            with open(self.bin, "wb") as out:
                for document in stream(args.corpus):
                    starts.append(at)
                    at += len(document)
                    out.write(document.tobytes())
            np.array(starts, dtype="<i8").tofile(self.idx)

    def samples(self, skip):
        tokens, starts = np.memmap(self.bin, dtype="<u4", mode="r"), np.memmap(self.idx, dtype="<i8", mode="r")
        count = (len(tokens) - 1) // self.length
        for epoch in itertools.count():
            order = np.random.default_rng(epoch).permutation(count)
            for sample in order[skip:] if skip < count else []:
                begin = int(sample) * self.length
                end = begin + self.length + 1
                inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, end)] - begin
                yield np.array(tokens[begin:end]), inside
            skip = max(0, skip - count)


class Datasets:
    def __init__(self, args, folder):
        from tokenizers import Tokenizer

        self.args, self.tokenizer = args, Tokenizer.from_file(os.path.join(args.corpus, "tokenizer.json"))
        with open(os.path.join(args.corpus, "manifest.json")) as file:
            self.end = json.load(file)["end_token"]

    def samples(self, skip):
        import datasets

        files = sorted(glob.glob(os.path.join(self.args.text, "*.parquet")))
        rows = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True).select_columns(["text"])
        held, starts = [], []
        for row in itertools.chain.from_iterable(rows.shuffle(seed=e, buffer_size=1000) for e in itertools.count()):
            starts.append(len(held))
            held += self.tokenizer.encode(row["text"], add_special_tokens=False).ids + [self.end]
            while len(held) > self.args.length:
                # What a user has who saved only the number of samples: read again up to there.
                if skip == 0:
                    yield np.array(held[: self.args.length + 1]), np.array([s for s in starts if s <= self.args.length])
                skip = max(0, skip - 1)
                held = held[self.args.length :]
                starts = [s - self.args.length for s in starts if s >= self.args.length]


def cpu_seconds():
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def private_mb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=["mmap", "datasets"])
    parser.add_argument("corpus")
    parser.add_argument("--text")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reader = {"mmap": Mmap, "datasets": Datasets}[args.reader](args, folder)
        count, memory, middle = args.tokens // args.length, 0.0, None
        start = cpu_seconds()
        for number, (tokens, _) in enumerate(itertools.islice(reader.samples(0), count)):
            if number == count // 2:
                middle = tokens
            if number % 100 == 0:
                memory = max(memory, private_mb())
        cpu = cpu_seconds() - start
        start = time.monotonic()
        tokens, _ = next(iter(reader.samples(count // 2)))
        figures = {"resume_ms": (time.monotonic() - start) * 1e3, "same_after_resume": bool(np.array_equal(tokens, middle))}
        read = count * args.length
        print(json.dumps({"reader": args.reader, "tokens": read, "mtokens_per_cpu_s": read / cpu / 1e6, "private_mb": memory} | figures))


main()
