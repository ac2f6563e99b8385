"""Images through `DiffrepFeatures`: the same numbers as a store, and a good citizen of scikit-learn."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils.estimator_checks import (
    check_estimator_repr,
    check_get_params_invariance,
    check_mixin_order,
    check_no_attributes_set_in_init,
    check_set_params,
    check_valid_tag_types,
)

from diffrep.config import BackboneConfig, DataConfig, ExtractConfig, FeatureRequest
from diffrep.errors import ConfigError, DataError, LayerError
from diffrep.extract.job import ExtractJob
from diffrep.extract.transformer import DiffrepFeatures
from diffrep.probe.reading import Reading

LAYERS, LEVELS = ["down_blocks.0", "up_blocks.1"], [10, 300]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (7, 16, 16), dtype=np.uint8)


@pytest.fixture
def make(unet):
    return lambda **options: DiffrepFeatures(
        **{"backbone": unet, "layers": LAYERS, "levels": LEVELS, "batch_size": 4} | options
    )


@pytest.fixture(scope="module", params=["float16", "float32"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("pool", ["mean", 2, "none"])
def test_the_numbers_of_a_store(make, unet, image_folder, tmp_path, dtype, pool):
    """Same ids, same features: of a folder's paths, absolute, relative and shuffled, and of pictures named by hand."""
    request = FeatureRequest(LAYERS, LEVELS, draws=2, pool=pool, seed=3, dtype=dtype)
    config = ExtractConfig(
        backbone=BackboneConfig(source="tiny"), data=DataConfig(path=image_folder), request=request,
        out=tmp_path / "store", batch_size=6, unit_size=18,
    )  # fmt: skip
    store = ExtractJob(config, unet).run()
    pairs = tuple((layer, level) for layer in store.layers for level in store.levels)
    expected = Reading("all layers", "all levels", pairs).read(store).numpy()
    features = make(draws=2, seed=3, pool=pool, dtype=dtype, root=image_folder, batch_size=6)
    paths = [image_folder / name for name in store.ids]
    found = features.fit_transform(paths)
    assert found.dtype == np.float32 and found.shape == (36, len(features.get_feature_names_out()))
    # The store's batches, so even the last bit is the same; from here on they are other batches.
    np.testing.assert_array_equal(found, expected)
    exact = {"rtol": 2e-3, "atol": 2e-3} if dtype == "float16" else {"rtol": 1e-5, "atol": 1e-5}
    order = np.random.default_rng(1).permutation(36)
    shuffled = features.transform(np.array(store.ids)[order])
    np.testing.assert_allclose(shuffled, expected[order], **exact)
    named = [(name, Image.open(path)) for name, path in zip(store.ids, paths, strict=True)][5:9]
    np.testing.assert_allclose(features.transform(named), expected[5:9], **exact)
    content = features.transform([picture for _, picture in named])
    assert np.abs(content - expected[5:9]).max() > 1e-2, "without their names they have other noise"


def test_every_kind_of_image_gives_the_same(make, arrays, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(len(arrays))]
    for file, array in zip(files, arrays, strict=True):
        Image.fromarray(array).save(file)
    expected = make().fit_transform(arrays)
    tensors = torch.from_numpy(arrays.astype(np.float32) / 255)[:, None]
    same = {
        "channel axis": (arrays[..., None], {}),
        "grey in RGB": (np.repeat(arrays[..., None], 3, axis=3), {}),
        "list of arrays": (list(arrays), {}),
        "pictures": ([Image.fromarray(array) for array in arrays], {}),
        "paths": (files, {"ids": "content"}),
        "strings": (np.array([str(file) for file in files], dtype=object), {"ids": "content"}),
        "tensors": (tensors, {}),
        "one by one": (arrays, {"batch_size": 1}),
    }
    for name, (images, options) in same.items():
        found = make(**options).transform(images)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
    # [-1, 1] rounds in the last bit, which is another picture to a hash; with an id it is the same one.
    names = [f"i{number}" for number in range(len(arrays))]
    signed = make(value_range=(-1, 1)).transform(list(zip(names, tensors * 2 - 1, strict=True)))
    np.testing.assert_allclose(signed, make().transform(list(zip(names, arrays, strict=True))), rtol=1e-4, atol=1e-4)


def test_a_row_depends_on_its_image_and_the_seed_only(make, arrays):
    whole = make().fit_transform(arrays)
    np.testing.assert_allclose(make().fit_transform(arrays[[4, 1, 1]]), whole[[4, 1, 1]], rtol=1e-5, atol=1e-5)
    assert np.abs(make(seed=1).fit_transform(arrays) - whole).max() > 1e-2
    clean = make(levels="clean"), make(levels="clean", seed=1)
    np.testing.assert_array_equal(*(one.fit_transform(arrays) for one in clean))


def test_names_of_columns(make, arrays):
    features = make(pool=2, layers="up_blocks.1")
    with pytest.raises(NotFittedError):
        features.get_feature_names_out()
    names = features.fit(arrays).get_feature_names_out()
    assert names[0] == "up_blocks.1@t=10[0,0,0]" and names[-1] == "up_blocks.1@t=300[7,1,1]"
    assert len(set(names)) == len(names) == 2 * 8 * 4
    assert features.shapes_ == {"up_blocks.1": (8, 2, 2)} and features.levels_ == ["t=10", "t=300"]
    framed = make().set_output(transform="pandas").fit_transform(arrays)
    assert list(framed.columns) == list(make().fit(arrays).get_feature_names_out())
    assert clone(make().set_output(transform="pandas")).fit_transform(arrays).columns[0] == "down_blocks.0@t=10[0]"


def test_the_checks_of_scikit_learn(unet_folder):
    """Those that do not feed tables of numbers."""
    one = DiffrepFeatures(str(unet_folder), LAYERS, LEVELS)
    for check in (
        check_no_attributes_set_in_init,
        check_get_params_invariance,
        check_set_params,
        check_estimator_repr,
        check_valid_tag_types,
        check_mixin_order,
    ):
        check("DiffrepFeatures", clone(one))
    assert not one.__sklearn_tags__().requires_fit
    parameters = one.get_params()
    assert clone(one).get_params() == parameters
    assert one.set_params(levels=[5]).levels == [5]


def test_fit_leaves_the_parameters_alone(make, arrays):
    features = make(levels=np.array([10, 300]), pool=np.int64(2))
    before = dict(features.get_params())
    expected = make(pool=2).fit_transform(arrays)
    np.testing.assert_array_equal(features.fit(arrays).transform(arrays), expected)
    assert all(features.get_params()[name] is value for name, value in before.items())
    public = {name for name in vars(features) if not name.endswith("_") and not name.startswith("_")}
    assert public == set(before)


def test_clones_share_a_network_and_copies_go_to_other_processes(make, unet, unet_folder, arrays):
    features = make()
    assert clone(features).backbone is unet
    assert clone(features).layers is not features.layers
    by_name = make(backbone=unet_folder, device="cpu")
    expected = features.fit_transform(arrays)
    np.testing.assert_array_equal(by_name.fit_transform(arrays), expected)
    sent = pickle.dumps(by_name)
    assert len(sent) < 4000, "the name travels, not the network"
    np.testing.assert_array_equal(pickle.loads(sent).transform(arrays), expected)
    config = BackboneConfig(source=unet_folder, device="cpu", config=None)
    np.testing.assert_array_equal(clone(make(backbone=config)).fit_transform(arrays), expected)


@pytest.mark.parametrize("kind", ["array", "tensor", "paths"])
def test_grid_search_over_layers_and_levels(make, image_folder, kind):
    """Brightness tells the classes apart; the search sees the right features in every fold."""
    files = sorted((image_folder / "train").rglob("*.png"))
    labels = np.array([int(file.parent.name[-1]) for file in files])
    images = {
        "paths": files,
        "array": np.stack([np.asarray(Image.open(file)) for file in files]),
    }
    images["tensor"] = torch.from_numpy(images["array"] / np.float32(255))[:, None]
    pipeline = Pipeline([("features", make(root=image_folder)), ("head", LogisticRegression())])
    grid = {"features__layers": [["down_blocks.0"], ["up_blocks.1"]], "features__levels": [[1], [999]]}
    if kind != "array":
        del grid["features__layers"]
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(images[kind], labels)
    scores = search.cv_results_["mean_test_score"]
    assert search.best_params_["features__levels"] == [1]
    assert search.best_score_ > 0.9 > scores.min() + 0.2, "noise alone tells nothing"
    assert (search.predict(images[kind]) == labels).mean() > 0.9
    best = search.best_estimator_["features"]
    np.testing.assert_array_equal(best.transform(images[kind]), clone(best).fit_transform(images[kind]))
    assert len(search.best_estimator_[:-1].get_feature_names_out()) in (8, 16)


def test_sizes(make, arrays, tmp_path):
    mixed = [arrays[0], np.pad(arrays[1], 8)]
    with pytest.raises(ConfigError, match=r"differ in size, .*; set size"):
        make().fit_transform(mixed)
    found = make(size=16, fit_mode="crop").fit_transform(mixed)
    assert found.shape == (2, 32)
    maps = make(pool="none").fit(arrays)
    with pytest.raises(ConfigError, match="Fit again, or set size"):
        maps.transform([np.pad(arrays[1], 8)])
    with pytest.raises(ConfigError, match="tensors are not resized"):
        make(size=16).fit(torch.zeros(2, 1, 32, 32))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("photo.png", DataError, "got one str; give a list"),
        (3, DataError, "got one int"),
        ([], DataError, "X holds no images"),
        (["nothing.png"], DataError, "'nothing.png': cannot read the image"),
        ([3], DataError, "image 0 of X: no image, but int"),
        (np.zeros((2, 784), np.uint8), DataError, r"image 0 of X: uint8 \(784,\); arrays must be uint8"),
        (np.zeros((2, 16, 16)), DataError, "float64 .* floats come as tensors"),
        (torch.zeros(2, 1, 16, 16, dtype=torch.uint8), DataError, "tensors must be floats"),
        (torch.full((2, 1, 16, 16), -1.0), ConfigError, r"leave value_range \[0.0, 1.0\]; set it"),
        (torch.full((2, 1, 16, 16), torch.nan), ConfigError, "leave value_range"),
        (torch.zeros(2, 3, 16, 16), ConfigError, r"images must be floats \(B, 1, H, W\)"),
    ],
)
def test_bad_images(make, images, error, message):
    with pytest.raises(error, match=message):
        make().fit_transform(images)


def test_a_table_is_no_list_of_images(make):
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="got one DataFrame"):
        make().fit(pandas.DataFrame({"path": ["a.png"]}))
    with pytest.raises(DataError, match="'a.png': cannot read"):
        make().fit(pandas.Series(["a.png"]))


def test_bad_parameters(make, arrays, image_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)4 errors in DiffrepFeatures.*request.pool.*fit.*ids.*batch_size"):
        make(pool="max", fit_mode="squeeze", batch_size=0, ids="index").fit(arrays)
    with pytest.raises(LayerError, match="up_blocks"):
        make(layers="up_block.1").fit(arrays)
    with pytest.raises(ConfigError, match="backbone is a int"):
        make(backbone=3).fit(arrays)
    file = next((image_folder / "train").rglob("*.png")).resolve()
    with pytest.raises(DataError, match="is not below root"):
        make(root=tmp_path).fit_transform([file])


def test_scikit_learn_is_optional():
    code = """
import sys
sys.modules["sklearn"] = None
import diffrep, diffrep.extract, diffrep.extract.job
from diffrep.errors import BackendUnavailable
try:
    import diffrep.extract.transformer
except BackendUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "DiffrepFeatures needs scikit-learn: pip install 'diffrep[sklearn]'\n"
