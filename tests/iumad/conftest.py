"""A data set and a configuration so small that a whole incremental run takes a second or two."""

import pytest
import torch

from iumad.config import apply_overrides
from iumad.data import open_dataset
from iumad.presets import get

DEMO = "demo:seed=1,train=6,validation=0,good=2,per_defect=1,size=64,classes="
TINY = [
    "data.image_size=64",
    "backbone.name=random:lite0",
    "model.dim=16",
    "model.num_heads=2",
    "model.layers=2",
    "model.ffn_dim=32",
    "model.fusion_layers=[1, 2]",
    "model.mamba_state=4",
    "model.bottleneck_dim=8",
    "train.epochs=2",
    "train.increment_epochs=2",
    "train.batch_size=4",
    "train.checkpoint_seconds=0",
    "protocol.name=2-1",
]


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Bits depend on the number of threads, and tiny tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cache_root(tmp_path_factory):
    """Rendered data and features, shared by all tests of a session."""
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IUMAD_CACHE", str(root))
        patch.setenv("XDG_CACHE_HOME", str(root / "xdg"))
        yield root


@pytest.fixture(scope="session")
def tiny_data(cache_root):
    """Spec of a demo data set of three classes."""
    from iumad.data.demo import DEMO_CLASSES

    spec = DEMO + "+".join(DEMO_CLASSES[:3])
    open_dataset(spec)
    return spec


@pytest.fixture
def tiny_config(tiny_data):
    """A function: overrides -> configuration."""

    def make(*overrides):
        return apply_overrides(get("small"), [f"data.dataset={tiny_data}", *TINY, *overrides])

    return make
