"""Writing shards: bytes that stay are copied inside the kernel, tensors that change pass through small buffers.

The output has the header and the offsets of the source, so everything between edited tensors is one stretch to copy.
"""

import contextlib
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from .edit import TensorEdit

BLOCK_BYTES = 1 << 20  # of rows edited at a time: read, merged and written while in cache
SYNC_BYTES = 256 << 20  # between two points from which a killed run continues
_COPY_BYTES = 16 << 20


def segments(base, shard, edits):
    """The file in order: (start, stop, None) to copy, (start, stop, TensorInfo) to edit."""
    infos = sorted((i for i in base.tensors.values() if i.shard == shard and i.name in edits), key=lambda i: i.start)
    position, parts = 0, []
    for info in infos:
        if position < info.start:
            parts.append((position, info.start, None))
        parts.append((info.start, info.stop, info))
        position = info.stop
    if position < base.shards[shard]:
        parts.append((position, base.shards[shard], None))
    return parts


class RowReader:
    """Rows of a tensor in a file, as tensors over one buffer that the next call reuses."""

    def __init__(self, handle, info, block_bytes):
        self.handle, self.info = handle, info
        self.rows, self.columns = info.matrix
        self.row_bytes = max(1, info.nbytes // max(1, self.rows))
        self.block_rows = max(1, min(self.rows, block_bytes // self.row_bytes))
        self._buffer = torch.empty(self.block_rows * self.row_bytes, dtype=torch.uint8)
        self._bytes = memoryview(self._buffer.numpy())

    def read(self, row, count):
        """(count, columns), starting at ``row``."""
        self.nbytes = count * self.row_bytes
        read_exactly(self.handle, self._bytes[: self.nbytes], self.info.start + row * self.row_bytes)
        return self._buffer[: self.nbytes].view(self.info.torch_dtype).view(count, self.columns)

    @property
    def bytes(self):
        """The bytes of the rows last read, as they are now."""
        return self._bytes[: self.nbytes]


def read_exactly(handle, view, offset):
    while len(view):
        count = os.preadv(handle, [view], offset)
        if count == 0:
            raise OSError(f"a file ended at byte {offset}: it changed while it was read")
        view, offset = view[count:], offset + count


def prepare(workers, handle, info, edit, block_bytes):
    """The :class:`TensorEdit` of a tensor in a file."""
    reader = RowReader(handle, info, block_bytes)
    with workers.together():
        return TensorEdit(info, edit, reader.read, reader.block_rows)


def edited_blocks(workers, handle, ready, block_bytes, use, done=0):
    """Calls ``use(offset in the file, bytes)`` in some thread for each block of the edited tensor, from the first one
    that ends after ``done``; yields (offset, size) in order when a block and all before it are through."""
    info = ready.info
    reader = RowReader(handle, info, block_bytes)

    def one(reader, row):
        count = min(reader.block_rows, reader.rows - row)
        offset = info.start + row * reader.row_bytes
        ready.apply_(reader.read(row, count), row)
        use(offset, reader.bytes)
        return offset, len(reader.bytes)

    size = reader.block_rows * reader.row_bytes
    first = max(0, done - info.start) // size if size else 0
    rows = range(first * reader.block_rows, reader.rows, reader.block_rows)
    yield from workers.run(one, rows, lambda: RowReader(handle, info, block_bytes))


class ShardWriter:
    """Writes one shard into the journal's folder, from where an earlier run left it.

    Points to continue from are synced by a thread meanwhile, which also keeps the amount of unwritten memory low.
    """

    def __init__(self, workers, base, shard, edits, journal, progress, block_bytes, sync_bytes):
        self.workers = workers
        self.base, self.shard, self.edits, self.journal = base, shard, edits, journal
        self.progress, self.block_bytes, self.sync_bytes = progress, block_bytes, sync_bytes
        self.path = os.path.join(journal.folder, shard)

    def write(self):
        size, done = self.base.shards[self.shard], self.journal.done.get(self.shard, 0)
        flags = os.O_RDWR | os.O_CREAT
        with contextlib.ExitStack() as stack:
            source = os.open(self.base.path(self.shard), os.O_RDONLY)
            stack.callback(os.close, source)
            target = os.open(self.path, flags, 0o666)
            stack.callback(os.close, target)
            if os.fstat(target).st_size < done:
                done = 0  # not the file that the journal speaks of
            os.ftruncate(target, done)
            syncer = stack.enter_context(ThreadPoolExecutor(1))
            self._write_rest(source, target, done, syncer)
            os.fsync(target)
        self.journal.record(self.shard, size)

    def _write_rest(self, source, target, done, syncer):
        self._synced, pending = done, []
        for offset, count in self._pieces(source, target, done):
            self.progress.advance(count)
            position = offset + count
            if position - self._synced >= self.sync_bytes:
                self._synced = position
                pending.append(syncer.submit(self._sync, target, position))
        for future in pending:
            future.result()

    def _sync(self, target, position):
        os.fdatasync(target)
        self.journal.record(self.shard, position)

    def _pieces(self, source, target, done):
        """Writes the file piece by piece; yields (offset, bytes) of each when it is written."""
        for start, stop, info in segments(self.base, self.shard, self.edits):
            if stop <= done:
                continue
            if info is None:
                position = max(start, done)
                while position < stop:
                    count = copy_range(source, target, position, min(stop - position, self._copy_bytes))
                    yield position, count
                    position += count
                continue
            ready = prepare(self.workers, source, info, self.edits[info.name], self.block_bytes)

            def put(offset, data):
                write_exactly(target, data, offset)

            yield from edited_blocks(self.workers, source, ready, self.block_bytes, put, done)

    @property
    def _copy_bytes(self):
        return min(_COPY_BYTES, self.sync_bytes)


def copy_range(source, target, offset, count):
    """Copies up to ``count`` bytes to the same place; returns how many."""
    if hasattr(os, "copy_file_range"):
        with contextlib.suppress(OSError):  # not between these file systems; an error of the disk comes again below
            copied = os.copy_file_range(source, target, count, offset, offset)
            if copied:
                return copied
    data = os.pread(source, min(count, 1 << 20), offset)
    if not data:
        raise OSError(f"a file ended at byte {offset}: it changed while it was read")
    write_exactly(target, memoryview(data), offset)
    return len(data)


def write_exactly(handle, view, offset):
    while len(view):
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count
