"""What the head of a segmentation network is."""

from torch import nn

from pipeline import schema
from pipeline.errors import PipelineError


class SegmentationHead(nn.Module):
    """Scores background and every class.

    ``forward`` takes the features of the backbone's ``taps``, in that order, and gives B x (K + 1) x h x w logits with
    background first.
    """

    def __init__(self, *taps: str) -> None:
        super().__init__()
        self.taps = taps


def dilations(settings: schema.Segmentation, count: int) -> tuple[int, ...]:
    """``settings.rates``, of which the network takes ``count``.

    Raises:
        PipelineError: there are more or fewer.
    """
    if len(settings.rates) != count:
        raise PipelineError(f"rates: holds {len(settings.rates)} dilations, {settings.network} takes {count}")
    return settings.rates
