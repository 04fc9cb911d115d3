"""Reading packed samples of L + 1 tokens with document boundaries as others do it, shuffled, one process and one thread.

    data_read.py READER CORPUS --scratch DIR [--length N] [--tokens N] [--text DIR]

CORPUS is a folder that `tiefsee prepare` wrote; its train tokens are what each reader reads, from its own format, made in
DIR if it is not there yet (not timed).

    mmap        a Megatron-style .bin of little-endian u32 and an .idx of document starts, through a memory map
    mosaic      MosaicML streaming: MDS shards of packed samples, shuffled (py1e), StreamingDataset
    mosaic-loader   the same through StreamingDataLoader, batches of 8
    datasets    Hugging Face datasets: packed samples in Arrow on disk, memory-mapped, shuffled, numpy format
    datasets-text   Hugging Face datasets: DIR/*.parquet of --text streamed, shuffled with a buffer, tokenised on the fly

Prints JSON: tokens per CPU-second, peak memory that is not a map's, time to the first sample after a stop in mid-corpus,
and whether it is the sample that an undisturbed run has there.
"""

import argparse
import glob
import itertools
import json
import os
import resource
import shutil
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


def packed(corpus, length):
    """Samples in stream order: L + 1 tokens at a distance of L, and the document starts among them."""
    held, starts, size = [], [], 0
    for document in stream(corpus):
        starts.append(size)
        held.append(document)
        size += len(document)
        if size <= length:
            continue
        tokens = np.concatenate(held)
        at = 0
        while size - at > length:
            yield tokens[at : at + length + 1], np.array([s - at for s in starts if at <= s <= at + length], dtype="<u4")
            at += length
        held, starts, size = [tokens[at:]], [s - at for s in starts if s >= at], size - at


class Mmap:
    def __init__(self, args):
        self.length = args.length
        self.bin, self.idx = os.path.join(args.scratch, "tokens.bin"), os.path.join(args.scratch, "tokens.idx")
        if not os.path.exists(self.idx):
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
        for epoch in itertools.count(skip // count):
            order = np.random.default_rng(epoch).permutation(count)
            for sample in order[skip % count :] if epoch == skip // count else order:
                begin = int(sample) * self.length
                end = begin + self.length + 1
                inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, end)] - begin
                yield np.array(tokens[begin:end]), inside


class Mosaic:
    batch = None

    def __init__(self, args):
        from streaming import MDSWriter

        self.folder = os.path.join(args.scratch, f"mds-{args.length}")
        if not os.path.exists(os.path.join(self.folder, "index.json")):
            shutil.rmtree(self.folder, ignore_errors=True)
            with MDSWriter(out=self.folder, columns={"tokens": "ndarray:uint32", "starts": "bytes"}) as out:
                for tokens, starts in packed(args.corpus, args.length):
                    out.write({"tokens": tokens.astype(np.uint32), "starts": starts.astype(np.uint32).tobytes()})  # its arrays may not be empty

    def samples(self, skip):
        import streaming

        streaming.base.util.clean_stale_shared_memory()
        data = streaming.StreamingDataset(local=self.folder, shuffle=True, shuffle_seed=1, batch_size=self.batch or 1)
        if self.batch:
            loader = streaming.StreamingDataLoader(data, batch_size=self.batch, collate_fn=list, num_workers=0)
            rows = lambda: itertools.chain.from_iterable(loader)
        else:
            rows = lambda: data
        size = data.size
        epoch, inside = divmod(skip, size)
        if skip:
            data.load_state_dict({"epoch": epoch, "sample_in_epoch": inside, "num_canonical_nodes": 1,
                                  "shuffle_seed": 1, "initial_physical_nodes": 1})
        for row in itertools.chain.from_iterable(iter(rows()) for _ in itertools.count()):
            yield row["tokens"], np.frombuffer(row["starts"], dtype=np.uint32)


class MosaicLoader(Mosaic):
    batch = 8


class Datasets:
    def __init__(self, args):
        import datasets

        self.folder = os.path.join(args.scratch, f"arrow-{args.length}")
        if not os.path.exists(os.path.join(self.folder, "state.json")):
            rows = lambda: ({"tokens": tokens.astype(np.int32), "starts": starts.astype(np.int32)} for tokens, starts in packed(args.corpus, args.length))
            lists = {name: datasets.List(datasets.Value("int32")) for name in ("tokens", "starts")}
            made = datasets.Dataset.from_generator(rows, features=datasets.Features(lists), cache_dir=os.path.join(args.scratch, "cache"))
            made.save_to_disk(self.folder)

    def samples(self, skip):
        import datasets

        data = datasets.load_from_disk(self.folder)
        count = len(data)
        for epoch in itertools.count(skip // count):
            shuffled = data.shuffle(seed=epoch, keep_in_memory=True).with_format("numpy")
            for row in (shuffled.select(range(skip % count, count)) if epoch == skip // count and skip % count else shuffled):
                yield row["tokens"], row["starts"]


class DatasetsText:
    def __init__(self, args):
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


READERS = {"mmap": Mmap, "mosaic": Mosaic, "mosaic-loader": MosaicLoader, "datasets": Datasets, "datasets-text": DatasetsText}


def cpu_seconds():
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def private_mb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) / 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", choices=list(READERS))
    parser.add_argument("corpus")
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--text")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    args = parser.parse_args()
    os.makedirs(args.scratch, exist_ok=True)
    reader = READERS[args.reader](args)
    # The stop falls between two of anybody's batches.
    count, memory, middle = args.tokens // args.length // 16 * 16, 0.0, None
    # What opening and importing cost is the resume's affair.
    samples = reader.samples(0)
    next(samples)
    start = cpu_seconds()
    for number, (tokens, _) in enumerate(itertools.islice(samples, count), 1):
        if number == count // 2:
            middle = np.array(tokens)
        if number % 100 == 0:
            memory = max(memory, private_mb())
    cpu = cpu_seconds() - start
    del samples
    start = time.monotonic()
    tokens, _ = next(iter(reader.samples(count // 2)))
    figures = {"resume_ms": (time.monotonic() - start) * 1e3, "same_after_resume": bool(np.array_equal(tokens, middle))}
    read = count * args.length
    print(json.dumps({"reader": args.reader, "tokens": read, "mtokens_per_cpu_s": read / cpu / 1e6, "private_mb": memory} | figures))


main()
