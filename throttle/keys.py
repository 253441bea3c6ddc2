"""The keys of buckets: how names and partitions are written down, and how they are shown; no I/O.

A partition is often what a user typed: it never reaches a store's key, a text or a log raw. Short
texts of safe characters stay as they are in keys, so that people can read them; all others become a
digest. Two different texts never share a key, and none is longer than a bound.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

__all__ = ["Key", "escaped", "partition_tag", "printable"]

_SAFE = re.compile(r"[A-Za-z0-9._/+@:-]{1,64}")


@lru_cache(maxsize=4096)
def escaped(text: str) -> str:
    """Return the text itself when it is short and safe, else ``#`` and 32 hex digits.

    The empty text becomes a digest as well: Redis Cluster takes no hash tag from ``{}``.
    """
    if _SAFE.fullmatch(text):
        return text
    data = text.encode("utf-8", "surrogatepass")
    return "#" + hashlib.blake2b(data, digest_size=16).hexdigest()


class Key(str):
    """The name and the partition of a bucket, in one string for people: ``twilio:+15550001``.

    Texts and logs show it (`shown`) with a tag in the partition's place. Stores tell buckets apart by its
    `tag`: ``|`` is in no escaped text, so `a:b` with `c` is never `a` with `b:c`, and no partition
    is not the empty one.
    """

    __slots__ = ("name", "part", "tag")

    name: str
    part: str | None
    """The partition, escaped; None when there is none."""
    tag: str

    def __new__(cls, name: str, partition: str | None = None) -> Key:
        named = escaped(name)
        safe = None if partition is None else escaped(partition)
        key = super().__new__(cls, name if safe is None else f"{name}:{safe}")
        key.name = name
        key.part = safe
        key.tag = named if safe is None else f"{named}|{safe}"
        return key

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (self.name, self.part, self.tag, str(self))

    def shown(self) -> str:
        """Return the name, and a tag that stands for the partition."""
        if self.part is None:
            return printable(self.name)
        return f"{printable(self.name)} [{partition_tag(self.part)}]"


def _restored(name: str, part: str | None, tag: str, text: str) -> Key:
    key = str.__new__(Key, text)
    key.name, key.part, key.tag = name, part, tag
    return key


def partition_tag(partition: str) -> str:
    """Return eight hex digits that stand for a partition in texts and logs."""
    return hashlib.blake2b(partition.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()


def printable(text: str, most: int = 80) -> str:
    """Return text that cannot break a line or a terminal: escaped, and cut at `most` characters."""
    safe = text if text.isascii() and text.isprintable() else ascii(text)[1:-1]
    return safe if len(safe) <= most else safe[: most - 3] + "..."
