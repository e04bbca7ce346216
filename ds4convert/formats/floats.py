"""Blocks of small floats: mxfp4, mxfp8 and nvfp4, encoded and decoded."""
from ds4convert.formats.scalars import F32
def encode(values, codec, rounding, importance): raise NotImplementedError
def decode(codec, weight, scales): raise NotImplementedError
