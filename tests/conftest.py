"""One thread per test, where the real data lie, and the small models that several modules read."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

# On small tensors a second thread costs more than it brings, and where other work shares the cores
# it costs milliseconds per operation. Set before torch is loaded, and so for processes of tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test writes to the user's home, or is answered from it; those of the cache name a folder.
os.environ["DIVE_FAST_CACHE"] = ""

import numpy as np  # noqa: E402
import torch  # noqa: E402

DATA = Path(__file__).parents[2] / "shared" / "data"


# Shells start what runs in the background with Ctrl-C ignored, and tests ask what it does.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """What a fixture or a test draws does not depend on what its process ran before."""
    _seed()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    _seed()


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What tests print may hold names that are no UTF-8, which cannot be sent between processes."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """The path of an archive of real images; the test is skipped where it does not lie."""

    def find(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"the real images are not here: {name} in ../shared/data")
        return DATA / name

    return find


# -- model directories, written once per process; tests read them, and copy what they change ------


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion."""
    from tiny_sd import write_sd

    return write_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion XL."""
    from tiny_sd import write_sdxl

    return write_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def dit_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DiT of grey images."""
    from tiny import write_model

    return write_model(tmp_path_factory.mktemp("models") / "dit")


@pytest.fixture(scope="session")
def latent_dit_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small DiT of latents, with its VAE."""
    from tiny import write_model

    return write_model(tmp_path_factory.mktemp("models") / "latent-dit", vae=True)


@pytest.fixture(scope="session")
def layout_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small layout-to-image model: two objects, grid 5, crop slots; classes one, two, three."""
    from tiny_layout import make_layout_model

    directory = tmp_path_factory.mktemp("models") / "layout"
    make_layout_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def scenes_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout-to-image model of the scenes' layouts, random weights; named as the zoo's."""
    from tiny_layout import make_scenes_model

    directory = tmp_path_factory.mktemp("zoo") / "scenes"
    make_scenes_model().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def small_dit():
    """The small DiT on which the published loops run."""
    from baseline_inputs import make_transformer

    return make_transformer()


@pytest.fixture(scope="session")
def dit_errors(small_dit) -> torch.Tensor:
    """The published enumeration at 25 timesteps: [C, 25]."""
    from baseline_inputs import ALPHA_BAR, N_CLASSES, NOISES, X0

    from bench.baselines.diffusion_classifier import eval_prob_all

    return eval_prob_all(small_dit, X0, N_CLASSES, ALPHA_BAR, NOISES, 40)


@pytest.fixture(scope="session")
def sd2_unet():
    """A UNet of Stable Diffusion 2's layout."""
    from tiny_unet import make_unet

    return make_unet("sd2")
