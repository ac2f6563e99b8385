"""kNN classification and few-shot draws against DINOv2's numbers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from diffrep.probe.neighbours import knn_scores
from diffrep.probe.split import few_shot_rows

NEIGHBOURS = (5, 10, 20)


@pytest.fixture(scope="module")
def io(golden):
    return load_file(golden / "knn" / "dinov2_knn.safetensors")


@pytest.fixture(scope="module")
def expected(golden):
    return json.loads((golden / "knn" / "dinov2_knn.json").read_text())


def accuracy(votes, labels):
    return (votes.argmax(1) == labels).float().mean().item()


def test_votes_and_accuracies(io, expected):
    train, labels, queries = io["train_features"], io["train_labels"], io["test_features"]
    theirs = knn_scores(train, labels, queries, 5, NEIGHBOURS, normalise="most")
    ours = knn_scores(train, labels, queries, 5, NEIGHBOURS)
    for k in NEIGHBOURS:
        torch.testing.assert_close(theirs[k], io[f"probas.k{k}"], atol=1e-5, rtol=0)
        assert torch.equal(theirs[k].argmax(1), io[f"pred.k{k}"])
        assert torch.equal(ours[k].argmax(1), io[f"pred.k{k}"])
        torch.testing.assert_close(ours[k].sum(1), torch.ones(100))
        assert accuracy(theirs[k], io["test_labels"]) == pytest.approx(expected[f"k{k}.micro"]["top-1"])
    found = [round(accuracy(theirs[k], io["test_labels"]), 2) for k in NEIGHBOURS]
    assert found == [0.54, 0.56, 0.59]


@pytest.mark.parametrize("shots", [5, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_few_shot_draws(io, expected, shots, seed):
    before = torch.get_rng_state()
    rows = torch.from_numpy(few_shot_rows(io["train_labels"].numpy(), shots, seed))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(rows, io[f"fewshot.n{shots}.try{seed}.indices"])
    train, labels = io["train_features"][rows], io["train_labels"][rows]
    for k in (k for k in (5, 10) if k <= shots):
        votes = knn_scores(train, labels, io["test_features"], 5, (k,))[k]
        assert accuracy(votes, io["test_labels"]) == pytest.approx(expected[f"fewshot.n{shots}.try{seed}.k{k}.top1"])
