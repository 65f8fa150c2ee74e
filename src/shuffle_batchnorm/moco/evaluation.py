"""What the features are worth: k nearest neighbours, and a linear probe."""

import warnings
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shuffle_batchnorm.probe.isolation import isolated

Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    loader: Batches,
    device: torch.device | str = "cpu",
    *,
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode a data set with the backbone, in eval mode.

    Running statistics normalise, no buffer changes, nothing is communicated, and every module has
    its training flag back afterwards.

    Args:
        encoder: with an attribute ``backbone``, images ``[N, c, H, H]`` to ``[N, D]``; or itself
            such a module.
        loader: of batches, images ``[N, c, H, H]`` and labels ``[N]``.
        device: where the encoder is.
        prepare: from the loader's images to what the encoder takes.

    Returns:
        Features ``[M, D]`` of unit length, float32 or wider, and labels ``[M]``, on the device.

    Example:
        >>> loader = [(torch.randn(4, 3), torch.arange(4)), (torch.randn(2, 3), torch.arange(2))]
        >>> features, labels = extract_features(nn.Linear(3, 5), loader)
        >>> features.shape, labels.tolist()
        (torch.Size([6, 5]), [0, 1, 2, 3, 0, 1])
    """
    backbone: nn.Module = getattr(encoder, "backbone", encoder)
    features, labels = [], []
    with isolated(backbone.modules(), []):
        backbone.eval()
        for images, targets in loader:
            inputs = images.to(device, non_blocking=True)
            encoded: Tensor = backbone(inputs if prepare is None else prepare(inputs))
            if encoded.dtype != torch.float64:
                encoded = encoded.float()
            features.append(F.normalize(encoded, dim=1))
            labels.append(targets.to(device, non_blocking=True))
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.1,
    classes: int,
    chunk: int = 1024,
) -> float:
    r"""Classify by the k nearest training features, weighted by their similarity.

    .. math:: \hat y(x) = \arg\max_c \sum_{i \in \text{NN}_k(x)} [y_i = c] \exp(x \cdot x_i / T)

    Communication: none.

    Args:
        train_features: ``[M, D]``, of unit length.
        train_labels: ``[M]``.
        test_features: ``[M', D]``, of unit length.
        test_labels: ``[M']``.
        k: neighbours; all of them, if there are fewer.
        temperature: T.
        classes: how many there are.
        chunk: test features compared at once, which bounds the memory.

    Returns:
        The share of test features that get their label.

    Source:
        Wu et al. 2018, arXiv 1805.01978, section 3.4.

    Example:
        >>> features, labels = F.normalize(torch.randn(6, 3)), torch.arange(6)
        >>> knn_accuracy(features, labels, features, labels, k=1, classes=6)
        1.0
    """
    k = min(k, len(train_features))
    hits = 0
    for features, labels in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        similarity, neighbours = (features @ train_features.T).topk(k, dim=1)  # [n, k]
        # Relative to the nearest, which can't overflow and leaves the largest vote the largest.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(features), classes)
        votes.scatter_add_(1, train_labels[neighbours], weights)
        hits += int((votes.argmax(1) == labels).sum())
    return hits / len(test_labels)


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    strength: float = 1.0,
    iterations: int = 1000,
) -> float:
    """Train a linear classifier on frozen features, and test it.

    Multinomial logistic regression on features brought to mean 0 and deviation 1, by scikit-learn.
    A search that runs out of iterations warns and still gives its accuracy.

    Communication: none.

    Args:
        train_features: ``[M, D]``.
        train_labels: ``[M]``.
        test_features: ``[M', D]``.
        test_labels: ``[M']``.
        strength: inverse of the L2 penalty, scikit-learn's C.
        iterations: of L-BFGS, at most.

    Returns:
        The share of test features that get their label.

    Example:
        >>> features, labels = torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
        >>> linear_probe(features, labels, features, labels)
        1.0
    """
    # Not at the top: training does without it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, x_test, y_test = (
        t.cpu().numpy() for t in (train_features, train_labels, test_features, test_labels)
    )
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(C=strength, max_iter=iterations)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(x, y)
    return float(classifier.score(x_test, y_test))
