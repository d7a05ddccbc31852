"""Averages to inference engines, version by version: sinks for `ShardedEMA.publish`, and readers.

::

    a callable           engine.load_weights         the engine itself
    FolderSink           folder/VERSION, current     Watched, from_pretrained(folder/current)
    GroupSink            broadcast                   receive
    SharedMemorySink     /dev/shm                    SharedMemoryReader
"""

from __future__ import annotations

from shardema.publishing.folder import FolderSink, Watched
from shardema.publishing.group import Connection, GroupSink, receive
from shardema.publishing.loader import Loader
from shardema.publishing.publication import Header, Publication, Sink, Version
from shardema.publishing.shared_memory import SharedMemoryReader, SharedMemorySink

__all__ = [
    "Connection",
    "FolderSink",
    "GroupSink",
    "Header",
    "Loader",
    "Publication",
    "SharedMemoryReader",
    "SharedMemorySink",
    "Sink",
    "Version",
    "Watched",
    "receive",
]
