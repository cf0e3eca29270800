"""Model directories: where their tensors are, what is held of them and how, loading and saving."""

from moebius.models.store.checkpoint import Checkpoint, fingerprint, open_checkpoint
from moebius.models.store.plan import PlannedWeight
from moebius.models.store.tensors import Store, StoredTensor

__all__ = [
    "Checkpoint",
    "PlannedWeight",
    "Store",
    "StoredTensor",
    "fingerprint",
    "open_checkpoint",
]
