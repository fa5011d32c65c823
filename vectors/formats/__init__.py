"""Files on disk: the native steering-vector file, canonical JSON, atomic writes."""

from vectors.formats.atomic import write_atomic
from vectors.formats.canonical import canonical_json, sha256
from vectors.formats.native import read_vector, vector_bytes, vector_from_bytes, write_vector

__all__ = [
    "canonical_json",
    "read_vector",
    "sha256",
    "vector_bytes",
    "vector_from_bytes",
    "write_atomic",
    "write_vector",
]
