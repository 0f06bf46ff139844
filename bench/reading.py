"""Images per second of ``evaluate`` over photographs, by how many processes read them ahead.

    python -c "from bench.reading import main; main()" --pictures det3_bccd_640px.zip --n 500

(With -m every reader would import this module, as it imports the script that starts it; the command
line's own is light.)

Lays the archive's JPEG files out as a folder of N by class, each again where they are fewer, and
evaluates it with readers 0, 1 and 2, which take turns. Two networks: "digits" of the zoo with one
probe, beside which reading is everything; and "vae", a small random network behind an AutoencoderKL
for 256 px. The seconds are those of the whole run, the start of the readers included. Ids and
classes must be those of readers 0. Then images per second of the encoder alone, by how many it
takes at once. Appends to bench/results/reading.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import zipfile
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderKL

from bench import records
from dive_fast import DiffusionClassifier, Schedule
from dive_fast.data import open_dataset
from dive_fast.evaluation import evaluate, read_records
from dive_fast.evaluation.encoding import encoded

READERS = (0, 1, 2)
AT_ONCE = (1, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", required=True, metavar="ZIP", help="an archive with JPEGs")
    parser.add_argument("--n", type=int, default=500, help="images (default: 500)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures"
        lay_out(Path(arguments.pictures), pictures, arguments.n)
        for name in arguments.networks:
            compare(name, NETWORKS[name](), pictures, Path(folder) / name, arguments.rounds)
    if "vae" in arguments.networks:
        encoder_alone(behind_a_vae())


def lay_out(archive: Path, folder: Path, n: int) -> None:
    """N files by class, of classes 0 to 9."""
    with zipfile.ZipFile(archive) as file:
        names = [name for name in file.namelist() if name.lower().endswith((".jpg", ".jpeg"))]
        for i in range(n):
            target = folder / str(i % 10) / f"{i:06d}.jpg"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read(names[i % len(names)]))


def digits() -> DiffusionClassifier:
    return DiffusionClassifier.from_pretrained("digits")


class Small(torch.nn.Module):
    """Two convolutions over x_t, told the class by a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(4, 32, 3, padding=1)
        self.last = torch.nn.Conv2d(32, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.last(torch.nn.functional.silu(self.first(x) + c[:, :, None, None]))


def behind_a_vae() -> DiffusionClassifier:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32),
        latent_channels=4,
        norm_num_groups=8,
    )
    return DiffusionClassifier.from_network(
        Small(),
        schedule=Schedule.linear(),
        embeddings=torch.randn(10, 32),
        shape=(4, 32, 32),
        names=[str(i) for i in range(10)],
        vae=vae.eval(),
        name="vae",
    )


NETWORKS = {"digits": digits, "vae": behind_a_vae}


def compare(
    name: str, classifier: DiffusionClassifier, pictures: Path, out: Path, rounds: int
) -> None:
    """Times and records the runs of one network."""
    data = open_dataset(pictures, classifier.names)
    seconds: dict[int, list[float]] = {readers: [] for readers in READERS}
    expected = None
    for round_ in range(rounds):
        for readers in READERS:
            run = out / f"{round_}-{readers}"
            start = time.perf_counter()
            evaluate(classifier, data, run, strategy="enumerate", probes=1, readers=readers)
            seconds[readers].append(time.perf_counter() - start)
            found = {key: record["index"] for key, record in read_records(run).items()}
            expected = expected or found
            assert found == expected, (name, readers)
    for readers, times in seconds.items():
        row = {
            "network": name,
            "readers": readers,
            "n": len(data.examples),
            "rounds": rounds,
            "images_per_second": len(data.examples) / median(times),
            "spread": [len(data.examples) / t for t in (max(times), min(times))],
        }
        low, high = row["spread"]
        print(
            f"{name:7} readers {readers} {row['images_per_second']:7.1f} images a second "
            f"[{low:.1f}, {high:.1f}]",
            flush=True,
        )
        records.append("reading", row, classifier)


def encoder_alone(classifier: DiffusionClassifier, n: int = 64) -> None:
    channels, size, _ = classifier.model.image_shape
    pixels = torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(0))
    seconds: dict[int, list[float]] = {at_once: [] for at_once in AT_ONCE}
    expected = torch.stack(
        [x0 for _, x0 in encoded(enumerate(pixels), classifier.encode_pixels, 1)]
    )
    for _ in range(3):
        for at_once in AT_ONCE:
            start = time.perf_counter()
            found = [x0 for _, x0 in encoded(enumerate(pixels), classifier.encode_pixels, at_once)]
            seconds[at_once].append(time.perf_counter() - start)
            torch.testing.assert_close(torch.stack(found), expected, rtol=1e-3, atol=1e-4)
    for at_once, times in seconds.items():
        row = {
            "network": "encoder alone",
            "at_once": at_once,
            "n": n,
            "rounds": 3,
            "images_per_second": n / median(times),
            "spread": [n / max(times), n / min(times)],
        }
        print(f"encoder {at_once} at once {row['images_per_second']:7.1f} images a second")
        records.append("reading", row, classifier)


if __name__ == "__main__":
    main()
