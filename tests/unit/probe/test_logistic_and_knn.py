import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from diffrep.errors import ConfigError
from diffrep.probe import LogisticPath, knn_scores, stratified_split
from diffrep.probe.split import stratified_folds


@pytest.mark.parametrize("dim", [5, 12, 90])
def test_every_penalty_reaches_scikit_learns_optimum(blobs, dim):
    x, y = blobs(60, dim=dim)
    penalties = (1e-3, 1e-2, 1e-1, 1.0)
    path = LogisticPath(penalties, max_iter=2000).fit(x, y, 3)
    queries, _ = blobs(20, dim=dim, seed=1)
    ours = path.scores(queries).softmax(-1)
    for i, penalty in enumerate(penalties):
        reference = LogisticRegression(C=1 / (penalty * len(x)), max_iter=10_000, tol=1e-8)
        reference.fit(((x - path.mean) / path.std).numpy(), y.numpy())
        expected = reference.predict_proba(((queries - path.mean) / path.std).numpy())
        np.testing.assert_allclose(ours[i], expected, atol=5e-3)


def test_penalties_do_not_disturb_each_other(blobs):
    x, y = blobs(60)
    together = LogisticPath((1e-2, 1.0), 500).fit(x, y, 3).scores(x)
    for i, penalty in enumerate((1e-2, 1.0)):
        alone = LogisticPath((penalty,), 500).fit(x, y, 3).scores(x)
        torch.testing.assert_close(together[i], alone[0], atol=2e-3, rtol=1e-3)


def test_constant_features_and_large_offsets(blobs):
    x, y = blobs(60)
    x = torch.cat([1000 + x, torch.full((60, 1), 7.0)], dim=1)
    path = LogisticPath((1e-2,), 200).fit(x, y, 3)
    assert torch.isfinite(path.scores(x)).all()
    assert (path.scores(x)[0].argmax(1) == y).float().mean() > 0.9
    torch.testing.assert_close(path.head(0)(x), path.scores(x)[0], atol=1e-4, rtol=1e-4)


def test_knn_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0])
    votes = knn_scores(train, labels, torch.tensor([[2.0, 0.0]]), 2, (1, 2, 3), temperature=0.5)
    a, b, c = np.exp(np.array([1.0, 0.8, 0.0]) / 0.5)
    np.testing.assert_allclose(votes[1][0], [1, 0], atol=1e-6)
    np.testing.assert_allclose(votes[2][0], [a / (a + b), b / (a + b)], rtol=1e-5)
    np.testing.assert_allclose(votes[3][0], [a / (a + b + c), (b + c) / (a + b + c)], rtol=1e-5)
    with pytest.raises(ConfigError, match="k=5 needs at least 5 training samples, there are 4"):
        knn_scores(train, labels, train, 2, (5,))


def test_knn_chunks_change_nothing(blobs):
    x, y = blobs(50)
    whole = knn_scores(x, y, x, 3, (5,))[5]
    torch.testing.assert_close(knn_scores(x, y, x, 3, (5,), chunk=7)[5], whole)


def test_split_keeps_every_class():
    labels = np.array([0] * 50 + [1] * 10 + [2] * 2 + [3])
    first, second = stratified_split(labels, 0.2, seed=0)
    assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(63))
    assert np.bincount(labels[second], minlength=4).tolist() == [10, 2, 1, 0]
    again = stratified_split(labels, 0.2, seed=0)
    assert np.array_equal(again[1], second)
    assert not np.array_equal(stratified_split(labels, 0.2, seed=1)[1], second)


def test_folds_spread_every_class():
    labels = np.array([0] * 50 + [1] * 7)
    fold = stratified_folds(labels, 5, seed=0)
    assert np.bincount(fold[labels == 0]).tolist() == [10] * 5
    assert sorted(np.bincount(fold[labels == 1], minlength=5)) == [1, 1, 1, 2, 2]
