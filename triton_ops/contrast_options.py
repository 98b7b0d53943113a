"""What contrastive losses offer alike: unit vectors, label smoothing, a margin; none of it needs another matrix.

Logits of a row are s_ij = scale x_i . y_j, that of its true key, n_i = scale (x_i . p_i - margin), among them.

* Unit vectors: x / max(|x|, 1e-6), in float32 at least, before products are taken in the type of the vectors. It is
  torch's F.normalize, whose gradient autograd chains to that of the loss: 2 N D more numbers are kept, and none is
  saved by doing it in the kernels, which read a vector many times.
* A margin: the true key has to be nearer by so much. Wang et al. 2018, "Additive margin softmax for face
  verification", https://arxiv.org/abs/1801.05599; for retrieval, in both directions, Yang et al. 2019, "Improving
  multilingual sentence embedding using bi-directional dual encoder with additive margin softmax",
  https://arxiv.org/abs/1902.08564, where it is 0.3. The negatives' logits stay as they are.
* Label smoothing by e: the target has e / M of its mass on each key, true or not, and 1 - e more on the true one.
  Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7; ALIGN has 0.1 of it (Jia et al. 2021,
  https://arxiv.org/abs/2102.05918, section 5). With the loss l_i without it,

      l_i + e (n_i - mean_j s_ij)      mean_j s_ij = scale x_i . mean_j y_j, and the margin's part of it

  so that the mean of all logits costs O((N + M) D).

Shapes: N rows, M keys, D width.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from selfsup.kernel.errors import ContractError

from .contrast import exact, similarity
from .contrast_ring import mean_of_all, size_of

SHORTEST = 1e-6  # a vector shorter than this is divided by it


def unit(vectors: Tensor) -> Tensor:
    """Vectors [N, D] of length 1, in their own type; one of zeros stays so."""
    return F.normalize(vectors.to(exact(vectors.dtype)), dim=-1, eps=SHORTEST).to(vectors.dtype)


def inverse(temperature: float | Tensor) -> float | Tensor:
    """The scale of a temperature."""
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ContractError(f"a temperature must be above 0, and is {temperature}")
    return 1 / temperature


def check_share(label_smoothing: float) -> None:
    """Raise unless it is a share."""
    if not 0 <= label_smoothing <= 1:
        raise ContractError(f"label_smoothing must be from 0 to 1, and is {label_smoothing}")


def above_mean(
    near: Tensor,
    rows: Tensor,
    keys: Tensor,
    scale: Tensor,
    *,
    margin: float,
    group: ProcessGroup | None,
    beside: bool = False,
) -> Tensor:
    """How far the logit of each row's true key is above the mean of all its logits, n_i - mean_j s_ij: [N].

    Args:
        near: n_i [N], the margin taken off.
        rows: [N, D].
        keys: [M, D] of this process; those of the others count too.
        scale: of the similarities.
        margin: what was taken off the true similarity, which is one of the mean's.
        group: the processes.
        beside: the true key is none of `keys`, and one more than they are.
    """
    count = keys.shape[0] * size_of(group)
    others = similarity(rows, mean_of_all(keys, group)[None]) * scale
    if beside:
        return (near - others) * (count / (count + 1))
    return near - others + scale * (margin / count)
