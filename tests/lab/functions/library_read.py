"""Reads sources of Python's library here and there on the disk: what is not in memory when a snapshot is taken.

No benchmark: each request reads its files anew, so that a start from a snapshot needs its disk.
"""

import hashlib
import os

# Of all that are there, so many at every request, far from each other, and one that depends on the input.
ALWAYS = 24


def sources():
    """Paths of all sources under /usr/lib, in order."""
    for directory, _, names in sorted(os.walk("/usr/lib")):
        paths = (os.path.join(directory, name) for name in sorted(names) if name.endswith(".py"))
        # Debian has links to what the laboratory's disk leaves out.
        yield from filter(os.path.isfile, paths)


FILES = list(sources())


def read_past_the_cache(path):
    """A file's bytes, of which the page cache keeps nothing."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        parts = []
        while part := os.read(file, 1 << 16):
            parts.append(part)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return b"".join(parts)
    finally:
        os.close(file)


def answer(text):
    digest = hashlib.sha256()
    chosen = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % len(FILES)
    count = 0
    for path in FILES[:: len(FILES) // ALWAYS][:ALWAYS] + [FILES[chosen]]:
        data = read_past_the_cache(path)
        digest.update(data)
        count += len(data)
    return {"bytes": count, "checksum": digest.hexdigest()}
