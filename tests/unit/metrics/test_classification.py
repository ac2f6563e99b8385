import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, recall_score, top_k_accuracy_score
from torchmetrics.functional.classification import multiclass_confusion_matrix, multilabel_average_precision

from diffrep.errors import ConfigError, DataError
from diffrep.metrics import (
    accuracy,
    bootstrap_interval,
    confusion,
    mean_average_precision,
    per_class_accuracy,
    standard_error,
    top_k,
)


@pytest.fixture(scope="module")
def scored():
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(6, (200,), generator=generator)
    return torch.randn(200, 6, generator=generator) + torch.nn.functional.one_hot(labels, 6), labels


def test_top_k(scored):
    scores, labels = scored
    for k in (2, 5):
        assert top_k(scores, labels, k) == pytest.approx(top_k_accuracy_score(labels, scores, k=k), abs=1e-15)
    assert top_k(scores, labels, 1) == accuracy(scores.argmax(1), labels)
    assert top_k(scores, labels, 6) == 1
    with pytest.raises(ConfigError, match="top-7 of 6 classes"):
        top_k(scores, labels, 7)


def test_equal_scores_go_to_the_lower_class():
    scores, labels = torch.zeros(4, 4), torch.arange(4)
    assert [top_k(scores, labels, k) for k in (1, 2, 4)] == [0.25, 0.5, 1]
    assert top_k(scores, labels, 1) == accuracy(scores.argmax(1), labels)


def test_confusion_and_per_class_accuracy(scored):
    scores, labels = scored
    predicted = scores.argmax(1)
    counts = confusion(predicted, labels, 8)  # two classes never come
    assert counts.dtype == torch.int64
    assert np.array_equal(counts, confusion_matrix(labels, predicted, labels=range(8)))
    assert torch.equal(counts, multiclass_confusion_matrix(predicted, labels, 8))
    each = per_class_accuracy(predicted, labels, 8)
    np.testing.assert_allclose(each[:6], recall_score(labels, predicted, average=None), atol=1e-15)
    assert each[6:].isnan().all()
    assert each.dtype == torch.float64


@pytest.mark.parametrize("ties", [False, True])
def test_mean_average_precision(ties):
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(2, (120, 5), generator=generator)
    scores = torch.randn(120, 5, generator=generator) + targets
    scores = scores.round() if ties else scores
    found = mean_average_precision(scores, targets)
    expected = average_precision_score(targets, scores, average=None)
    np.testing.assert_allclose(found.each, expected, atol=1e-14)
    assert found.mean == pytest.approx(expected.mean(), abs=1e-14)
    theirs = multilabel_average_precision(scores.sigmoid(), targets, num_labels=5, average=None)
    np.testing.assert_allclose(found.each, theirs, atol=1e-5)
    order = torch.randperm(120, generator=generator)
    assert torch.equal(mean_average_precision(scores[order], targets[order]).each, found.each)


def test_labels_without_a_positive_are_left_out_and_counted():
    scores = torch.tensor([[3.0, 1, 9], [2, 2, 8], [1, 3, 7]])
    targets = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 1]])
    found = mean_average_precision(scores, targets)
    assert found.left_out == 1
    assert found.each[[0, 2]].tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 3])
    assert found.each[1].isnan()
    assert found.mean == pytest.approx((5 / 6 + 1 / 3) / 2)
    with pytest.raises(DataError, match="none of the 3 labels has a positive"):
        mean_average_precision(scores, torch.zeros(3, 3))


def test_large_scores_stay_apart():
    """Where a sigmoid would make them equal."""
    scores, targets = torch.tensor([[40.0], [50.0], [60.0]]), torch.tensor([[0], [0], [1]])
    assert mean_average_precision(scores, targets).mean == 1


def test_bootstrap_of_hits_and_of_numbers():
    hits = np.random.default_rng(0).random(400) < 0.7
    low, high = bootstrap_interval(hits)
    assert low < hits.mean() < high
    spread = 1.96 * np.sqrt(0.7 * 0.3 / 400)
    assert high - low == pytest.approx(2 * spread, rel=0.1)
    drawn = bootstrap_interval(hits.astype(float) * 10)  # not 0/1, so samples are drawn
    np.testing.assert_allclose(drawn, (10 * low, 10 * high), rtol=0.02)
    assert bootstrap_interval(hits, seed=1) == bootstrap_interval(hits, seed=1) != (low, high)


def test_bootstrap_of_pairs_is_narrower():
    """Two heads that agree on most samples differ by a surer amount than each is right."""
    random = np.random.default_rng(3)
    a = random.random(500) < 0.6
    b = np.where(random.random(500) < 0.05, True, a)
    low, high = bootstrap_interval(b.astype(int) - a.astype(int))
    assert low > 0
    each = bootstrap_interval(a)
    assert high - low < (each[1] - each[0]) / 2


def test_bootstrap_of_any_statistic():
    values = np.random.default_rng(4).normal(size=(300, 2))
    rows = np.column_stack([values[:, 0], values[:, 0] + 0.1 * values[:, 1]])
    low, high = bootstrap_interval(rows, resamples=200, statistic=lambda drawn: np.corrcoef(drawn.T)[0, 1])
    assert 0.99 < low < np.corrcoef(rows.T)[0, 1] < high < 1


def test_standard_error():
    assert standard_error(np.array([1.0, 2, 3, 4])) == pytest.approx(np.sqrt(5 / 3) / 2)
    with pytest.raises(DataError, match="two values or more; given: 1"):
        standard_error([0.5])


def test_bad_input(scored):
    scores, labels = scored
    with pytest.raises(DataError, match="scores of 1 of 200 samples hold NaN"):
        top_k(scores.index_fill(0, torch.tensor(3), torch.nan), labels, 1)
    with pytest.raises(DataError, match="labels go from 0 to 5; with 3 classes they go from 0 to 2"):
        confusion(labels.clamp(max=2), labels, 3)
    with pytest.raises(DataError, match="predictions go from 0 to 5"):
        per_class_accuracy(labels, labels.clamp(max=2), 3)
    with pytest.raises(DataError, match=r"both must be \(N, L\)"):
        mean_average_precision(scores, labels)
    with pytest.raises(DataError, match="must be 0 and 1"):
        mean_average_precision(scores, scores)
    for values in ([], [0.5, np.nan]):
        with pytest.raises(DataError, match="samples without NaN"):
            bootstrap_interval(np.array(values))
