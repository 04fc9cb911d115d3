"""Text in FineWeb's layout for the data benches: parquet of documents out of folders of text.

    data_corpus.py OUT MEGABYTES FOLDER...

Every UTF-8 file of up to 4 MB is a document (.gz unpacked first). Each folder gives an even share of what is left, so that no
kind of text is missing. OUT/*.parquet: column text beside FineWeb's others, zstd, row groups of 1000 documents.
"""

import gzip
import hashlib
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq

SHARD_BYTES = 32_000_000


def texts(folder, share):
    for root, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(root, name)
            if share <= 0:
                return
            if os.path.islink(path) or not 0 < os.path.getsize(path) < 4_000_000:
                continue
            try:
                data = open(path, "rb").read()
                text = (gzip.decompress(data) if name.endswith(".gz") else data).decode("utf-8")
            except (UnicodeDecodeError, OSError, EOFError):
                continue
            if text and "\0" not in text:
                share -= len(text.encode())
                yield os.path.relpath(path, folder), text


def write(out, number, rows):
    names, documents = [name for name, _ in rows], [text for _, text in rows]
    n = len(rows)
    table = pa.table({
        "text": documents, "id": [hashlib.sha256(name.encode()).hexdigest() for name in names], "dump": ["bench"] * n,
        "url": names, "date": [""] * n, "file_path": names, "language": ["en"] * n,
        "language_score": [1.0] * n, "token_count": pa.array([len(text) // 4 for text in documents], pa.int64()),
    })
    pq.write_table(table, os.path.join(out, f"{number:03}_00000.parquet"), compression="zstd", row_group_size=1000)


def main():
    out, left, folders = sys.argv[1], int(float(sys.argv[2]) * 1e6), sys.argv[3:]
    os.makedirs(out, exist_ok=True)
    rows, size, number, total, documents = [], 0, 0, 0, 0
    for index, folder in enumerate(folders):
        for row in texts(folder, left // (len(folders) - index)):
            length = len(row[1].encode())
            rows.append(row)
            size, left, total, documents = size + length, left - length, total + length, documents + 1
            if size >= SHARD_BYTES:
                write(out, number, rows)
                rows, size, number = [], 0, number + 1
    if rows:
        write(out, number, rows)
    print(f"{out}: {documents} documents, {total / 1e6:.1f} MB of text")


main()
