"""What a model directory says of how its matrices are quantised. No tensors, only their names and
shapes."""

from moebius.models.quantization.read import BESIDE, quantization_beside, read_quantization
from moebius.models.quantization.record import Parts, Plane, Quantization, Rule, Scheme

__all__ = [
    "BESIDE",
    "Parts",
    "Plane",
    "Quantization",
    "Rule",
    "Scheme",
    "quantization_beside",
    "read_quantization",
]
