"""The kernels, in Triton's language, by the operations that they are of.

Their arguments: pointers first, then sizes and strides in elements, then tile sizes.
"""
