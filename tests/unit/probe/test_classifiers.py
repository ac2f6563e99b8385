import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.neighbors import NearestCentroid

from diffrep.errors import ConfigError
from diffrep.probe.logistic import LogisticPath
from diffrep.probe.means import class_mean_scores
from diffrep.probe.neighbours import knn_scores
from diffrep.probe.ridge import RidgePath
from diffrep.probe.split import few_shot_rows, fraction_rows


def blobs(count, classes=3, dim=12, seed=0):
    """Gaussian clouds, one a class, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = np.random.default_rng(99).normal(size=(classes, dim))
    return torch.tensor(centres[labels] + rng.normal(size=(count, dim))).float(), torch.from_numpy(labels)


def tagged(count, dim=12, seed=0):
    """Samples with none to three labels, each of which depends on the features and a little chance."""
    x, _ = blobs(count, dim=dim, seed=seed)
    noise = np.random.default_rng(seed).normal(size=(count, 3))
    return x, (x[:, :3] + torch.from_numpy(noise).float() > 0).long()


def test_logistic_regression_of_several_labels_is_one_for_each():
    (x, y), (queries, _) = tagged(80), tagged(30, seed=1)
    penalties = (1e-3, 1e-1)
    path = LogisticPath(penalties, max_iter=2000).fit(x, y, 3)
    found = path.scores(queries).sigmoid()
    for i, penalty in enumerate(penalties):
        for label in range(3):
            reference = LogisticRegression(C=1 / (penalty * len(x)), max_iter=10_000, tol=1e-8)
            reference.fit(((x - path.mean) / path.std).numpy(), y[:, label].numpy())
            expected = reference.predict_proba(((queries - path.mean) / path.std).numpy())[:, 1]
            np.testing.assert_allclose(found[i, :, label], expected, atol=5e-3)
    torch.testing.assert_close(path.head(0)(queries), path.scores(queries)[0], atol=1e-4, rtol=1e-4)


def test_a_neighbour_votes_for_each_of_its_labels():
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    labels = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 1]])
    votes = knn_scores(train, labels, torch.tensor([[2.0, 0.0]]), 3, (1, 2), temperature=0.5)
    a, b = np.exp(np.array([1.0, 0.8]) / 0.5)
    np.testing.assert_allclose(votes[1][0], [1, 0, 1], atol=1e-6)
    np.testing.assert_allclose(votes[2][0], [a / (a + b), 0, 1], rtol=1e-5, atol=1e-6)


def test_votes_of_single_labels_are_those_of_their_one_hot_rows():
    x, y = blobs(50)
    single = knn_scores(x, y, x, 3, (3, 7), normalise="most")
    several = knn_scores(x, torch.nn.functional.one_hot(y), x, 3, (3, 7), normalise="most")
    for k in (3, 7):
        torch.testing.assert_close(single[k], several[k])
    assert (single[3].sum(1) < 1).all()


@pytest.mark.parametrize("dim", [5, 12, 90])
def test_every_ridge_penalty_is_scikit_learns(dim):
    x, y = blobs(60, dim=dim)
    queries, _ = blobs(20, dim=dim, seed=1)
    penalties = (1e-3, 1e-1, 1.0)
    path = RidgePath(penalties).fit(x, y, 3)
    standard, standard_queries = ((values - path.mean) / path.std for values in (x, queries))
    for i, penalty in enumerate(penalties):
        reference = RidgeClassifier(alpha=penalty * len(x)).fit(standard.double().numpy(), y.numpy())
        expected = reference.decision_function(standard_queries.double().numpy())
        np.testing.assert_allclose(2 * path.scores(queries)[i] - 1, expected, atol=1e-4)
        torch.testing.assert_close(path.head(i)(queries), path.scores(queries)[i], atol=1e-5, rtol=1e-5)


def test_ridge_of_several_labels_and_constant_features():
    x, y = tagged(60)
    x = torch.cat([x + 1000, torch.full((60, 4), 7.0)], dim=1)
    path = RidgePath((0.1,)).fit(x, y, 3)
    standard = ((x - path.mean) / path.std).double().numpy()
    # Four of sixteen features are constant, so the mean variance is 3/4.
    reference = Ridge(alpha=0.1 * 60 * 12 / 16).fit(standard, y.numpy())
    np.testing.assert_allclose(path.scores(x)[0], reference.predict(standard), atol=1e-4)


def test_nearest_class_means():
    (x, y), (queries, _) = blobs(60), blobs(40, seed=1)
    scores = class_mean_scores(x + 100, y, queries + 100, 3)
    reference = NearestCentroid().fit(x.numpy() + 100, y.numpy())
    assert np.array_equal(scores["euclidean"].argmax(1), reference.predict(queries.numpy() + 100))
    distances = torch.cdist(queries, torch.from_numpy(reference.centroids_).float() - 100)
    torch.testing.assert_close(scores["euclidean"], -distances.square(), atol=1e-3, rtol=1e-3)
    train, points = (torch.nn.functional.normalize(values) for values in (x, queries))
    means = torch.stack([train[y == c].mean(0) for c in range(3)])
    expected = torch.nn.functional.cosine_similarity(points[:, None], means[None], dim=-1)
    torch.testing.assert_close(class_mean_scores(x, y, queries, 3)["cosine"], expected, atol=1e-5, rtol=1e-5)


def test_class_means_of_absent_classes_and_of_several_labels():
    x, y = blobs(30)
    for scores in class_mean_scores(x, y, x, 5).values():
        assert torch.isinf(scores[:, 3:]).all()
        assert torch.isfinite(scores[:, :3]).all()
    with pytest.raises(ConfigError, match="nearest class mean needs one label a sample"):
        class_mean_scores(*tagged(30), x, 3)


def test_few_shots_of_every_class():
    labels = np.array([3] * 20 + [0] * 10 + [7] * 4)
    rows = few_shot_rows(labels, 4, seed=1)
    assert labels[rows].tolist() == [0] * 4 + [3] * 4 + [7] * 4
    assert len(set(rows)) == 12
    assert not np.array_equal(rows, few_shot_rows(labels, 4, seed=2))
    with pytest.raises(ConfigError, match="5 samples of each class are asked for and class 7 has 4"):
        few_shot_rows(labels, 5, seed=1)
    with pytest.raises(ConfigError, match="one label a sample"):
        few_shot_rows(np.eye(4, dtype=int), 1, seed=1)


def test_fractions_keep_every_class():
    labels = np.array([0] * 100 + [1] * 20 + [2] * 3)
    rows = fraction_rows(labels, 0.1, seed=0)
    assert np.bincount(labels[rows]).tolist() == [10, 2, 1]
    assert np.array_equal(rows, np.unique(rows))
    several = np.zeros((100, 3), dtype=int)
    several[:50, 0], several[97, 1] = 1, 1
    rows = fraction_rows(several, 0.05, seed=0)
    assert 97 in rows, "a rare label keeps a sample"
    assert several[rows, 0].any()
    assert 5 <= len(rows) <= 6
