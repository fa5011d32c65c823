"""Task vectors: exact deltas, recipes made of them, and the weights that recipes make."""

from vectors.tasks.delta import Change, decode_xor, delta, encode_xor, measure
from vectors.tasks.interference import interference
from vectors.tasks.linear import combine
from vectors.tasks.lowrank import low_rank
from vectors.tasks.merge import merge
from vectors.tasks.recipes import Operation, Recipe
from vectors.tasks.registry import METHODS, Method, method_named
from vectors.tasks.weights import materialise

__all__ = [
    "METHODS",
    "Change",
    "Method",
    "Operation",
    "Recipe",
    "combine",
    "decode_xor",
    "delta",
    "encode_xor",
    "interference",
    "low_rank",
    "materialise",
    "measure",
    "merge",
    "method_named",
]
