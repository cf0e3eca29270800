"""How a decoder and the batches that it computes are shared by the ranks that train it.

Every rank has some rows of every micro-batch and some experts of every layer, and all else.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from moebius.models.config import ModelConfig
from moebius.models.decoder import Decoder
from moebius.moe.share import WHOLE_BATCH, BatchShare
from moebius.train.data import Batch
from moebius.train.expert_parallel import RowsHere, TrainingRank
from moebius.train.ops import TrainingOps
from moebius.train.ranks import Ranks


class Sharing:
    """One rank's share of a decoder of this configuration, and of its batches.

    experts   its part in sharing the experts out; None for one rank alone, and without experts

    Raises ConfigError for more ranks than experts.
    """

    def __init__(self, ranks: Ranks, config: ModelConfig) -> None:
        self.ranks = ranks
        self.experts: TrainingRank | None = None
        if ranks.count > 1 and config.experts:
            self.experts = TrainingRank(config.experts, ranks)
        self._config = config
        self._tokens = RowsHere(ranks)

    def attach(self, decoder: Decoder) -> None:
        """Let what depends on all tokens of a batch know which of them are here."""
        tokens: BatchShare = WHOLE_BATCH if self.ranks.count == 1 else self._tokens
        assert isinstance(decoder.ops, TrainingOps)
        decoder.ops.tokens = tokens
        for router in decoder.routers.values():
            router.share = tokens

    def shard(self, batch: Batch) -> Batch:
        """This rank's rows of a batch, which is to be computed next. They may be none."""
        rows, length = batch.input_RL.shape
        count = self.ranks.count
        rank = self.ranks.rank
        mine = slice(rows * rank // count, rows * (rank + 1) // count)
        self._tokens.first = mine.start * length
        self._tokens.of = rows * length
        return Batch(*(x[mine] for x in batch))

    def is_own(self, name: str) -> bool:
        """Whether a parameter of the decoder is at this rank alone."""
        return self.experts is not None and self.experts.owner(name) is not None

    def gather(
        self, mine: Mapping[str, Tensor], wanted: Callable[[str], bool] = lambda name: True
    ) -> dict[str, Tensor]:
        """Tensors shaped as the decoder's parameters, of all ranks, at rank 0; elsewhere nothing.

        mine: those that are here, by the parameters' names. wanted: of which parameters there are
        such.
        """
        if self.experts is None:
            return {} if self.ranks.rank else dict(mine)
        whole = Decoder(self._config, TrainingOps(), device="meta")
        shapes = {name: x.shape for name, x in whole.named_parameters() if wanted(name)}
        return self.experts.gather(mine, shapes)
