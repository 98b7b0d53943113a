"""How many images a second the SimCLR pipeline makes into two views: ours against Pillow's.

    python benchmarks/pipeline.py
    python benchmarks/pipeline.py --sizes 224 --data FOLDER --workers 2 --rounds 9 --json out.json

Both read the same JPEG files from memory, with the same number of data workers, and make two views of every
image with the same distortions: random resized crop, flip, colour jitter (brightness, contrast, saturation,
hue in random order), grey, Gaussian blur.

* pillow: everything happens in the workers, image by image, with the operations that torchvision uses on
  Pillow images, and Pillow's own GaussianBlur. Workers hand over float tensors.
* selfsup: workers decode, views are made batch by batch in the main process, on --device.

Rounds alternate between the two, so that a busy machine slows both; a figure is the median of the rounds. Beside
images a second stands the processor time of all processes for an image, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as pillow
from PIL import ImageEnhance, ImageFilter
from torch.utils.data import DataLoader, Dataset, default_collate

from selfsup.kernel.random import stream
from selfsup.plugins.modalities.image import Image

PHOTOS = {32: (32, 32), 96: (150, 150), 224: (375, 500)}  # height and width of generated photos by the views' size
EXTENT = (0.08, 1.0)


def generate(count: int, size: tuple[int, int]) -> list[bytes]:
    """JPEG files that compress about as well as photos do: smooth shapes and sensor noise."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = pillow.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(size[::-1], pillow.Resampling.BICUBIC)).astype(int)
        noisy = (smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        pillow.fromarray(noisy).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def crop(image: pillow.Image, size: int) -> pillow.Image:
    """The random resized crop."""
    width, height = image.size
    box = (0, 0, width, height)
    for _ in range(10):
        area = width * height * random.uniform(*EXTENT)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            box = (left, top, left + w, top + h)
            break
    return image.crop(box).resize((size, size), pillow.Resampling.BILINEAR)


def turn_hue(image: pillow.Image, factor: float) -> pillow.Image:
    """Add to the hue channel, modulo 256."""
    h, s, v = image.convert("HSV").split()
    turned = np.array(h, dtype=np.uint8) + np.array(int(factor * 255) % 256, dtype=np.uint8)
    return pillow.merge("HSV", (pillow.fromarray(turned), s, v)).convert("RGB")


def jitter(image: pillow.Image) -> pillow.Image:
    """Brightness, contrast, saturation and hue in random order."""
    changes: list[Callable[[pillow.Image], pillow.Image]] = [
        lambda x: ImageEnhance.Brightness(x).enhance(random.uniform(0.2, 1.8)),
        lambda x: ImageEnhance.Contrast(x).enhance(random.uniform(0.2, 1.8)),
        lambda x: ImageEnhance.Color(x).enhance(random.uniform(0.2, 1.8)),
        lambda x: turn_hue(x, random.uniform(-0.2, 0.2)),
    ]
    random.shuffle(changes)
    for change in changes:
        image = change(image)
    return image


def pillow_view(image: pillow.Image, size: int) -> torch.Tensor:
    """One view, [3, size, size] float32."""
    image = crop(image, size)
    if random.random() < 0.5:
        image = image.transpose(pillow.Transpose.FLIP_LEFT_RIGHT)
    if random.random() < 0.8:
        image = jitter(image)
    if random.random() < 0.2:
        image = image.convert("L").convert("RGB")
    if random.random() < 0.5 and size >= 20:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)


class Files(Dataset[Any]):
    """Encoded images, through `make`."""

    def __init__(self, files: Sequence[bytes], make: Callable[[bytes], Any]) -> None:
        self.files, self.make = files, make

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        return index, self.make(self.files[index])


class PillowViews:
    """Decode an image and make both views of it."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, data: bytes) -> Any:
        image = pillow.open(io.BytesIO(data)).convert("RGB")
        return pillow_view(image, self.size), pillow_view(image, self.size)


class Collate:
    """Collate with `join`; add which process did it, and what processor time it has used so far."""

    def __init__(self, join: Callable[[Any], Any]) -> None:
        self.join = join

    def __call__(self, items: Sequence[Any]) -> Any:
        ids, values = zip(*items, strict=True)
        return torch.tensor(ids), self.join(values), os.getpid(), time.process_time()


class Pipeline:
    """One way to make views; `epoch` makes those of all files once and times it."""

    def __init__(self, dataset: Files, join: Callable[[Any], Any], finish: Callable[..., Any], options: Any) -> None:
        workers = options.workers
        self.finish, self.used = finish, {}
        self.loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=options.batch,
            collate_fn=Collate(join),
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=options.device != "cpu",
        )

    def epoch(self) -> tuple[float, float]:
        """Seconds that passed, and seconds of all processors."""
        before, used = time.process_time(), dict(self.used)
        start = time.perf_counter()
        for ids, batch, process, seconds in self.loader:
            for view in self.finish(ids, batch):
                if view.shape[0] != len(ids):
                    raise RuntimeError("a pipeline lost images")
            self.used[process] = seconds
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        passed = time.perf_counter() - start
        workers = sum(now - used.get(process, 0.0) for process, now in self.used.items() if process != os.getpid())
        return passed, time.process_time() - before + workers


def ours(files: Sequence[bytes], size: int, options: Any) -> Pipeline:
    modality = Image(size=size)
    device = torch.device(options.device)

    def finish(ids: torch.Tensor, raw: Any) -> list[torch.Tensor]:
        raw, ids = raw.to(device), ids.to(device)
        return [modality.view(raw, EXTENT, stream(0, name, ids)).x for name in ("first", "second")]

    return Pipeline(Files(files, modality.read), modality.collate, finish, options)


def pillows(files: Sequence[bytes], size: int, options: Any) -> Pipeline:
    def finish(ids: torch.Tensor, views: Any) -> list[torch.Tensor]:
        return [view.to(options.device, non_blocking=True) for view in views]

    return Pipeline(Files(files, PillowViews(size)), default_collate, finish, options)


def measure(files: Sequence[bytes], size: int, options: Any) -> dict[str, Any]:
    """Alternate between both pipelines; medians over the rounds."""
    pipelines = {"pillow": pillows(files, size, options), "selfsup": ours(files, size, options)}
    for pipeline in pipelines.values():
        pipeline.epoch()  # start the workers, fill the allocators
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in pipelines}
    for _ in range(options.rounds):
        for name, pipeline in pipelines.items():
            rounds[name].append(pipeline.epoch())
    row: dict[str, Any] = {"size": size, "images": len(files)}
    for name, times in rounds.items():
        row[f"{name}_images_per_s"] = len(files) / statistics.median(t for t, _ in times)
        row[f"{name}_cpu_ms_per_image"] = 1000 * statistics.median(c for _, c in times) / len(files)
    pairs = list(zip(rounds["pillow"], rounds["selfsup"], strict=True))
    row["speedup"] = statistics.median(p[0] / s[0] for p, s in pairs)
    row["speedup_range"] = [min(p[0] / s[0] for p, s in pairs), max(p[0] / s[0] for p, s in pairs)]
    row["cpu_ratio"] = statistics.median(p[1] / s[1] for p, s in pairs)
    return row


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    low, high = row["speedup_range"]
    return (
        f"{row['size']:5} {row['pillow_images_per_s']:10.0f} {row['selfsup_images_per_s']:10.0f} "
        f"{row['speedup']:7.2f}x "
        f"({low:4.2f}-{high:5.2f}) {row['pillow_cpu_ms_per_image']:8.2f} {row['selfsup_cpu_ms_per_image']:8.2f} "
        f"{row['cpu_ratio']:18.2f}x"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 96, 224], help="sides of the views in pixels")
    parser.add_argument("--data", type=Path, help="folder of JPEG files; default: generated photos")
    parser.add_argument("--images", type=int, default=0, help="how many files; default: by size, for about a second")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of torch in the main process, for both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="where our views are made, and both have to be")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    print(" size   pillow/s  selfsup/s  speedup      (range)   pillow  selfsup cpu-ms/image  ratio")
    for size in options.sizes:
        count = options.images or max(256, 2**17 // size // 2)
        if options.data:
            paths = sorted(p for p in options.data.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
            files = [path.read_bytes() for path in paths[:count]]
        else:
            files = generate(count, PHOTOS.get(size, (size * 5 // 3, size * 9 // 4)))
        row = measure(files, size, options)
        rows.append(row)
        print(line(row), flush=True)
    if options.json:
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        software = {"python": platform.python_version(), "torch": torch.__version__, "pillow": pillow.__version__}
        settings = {name: str(value) for name, value in vars(options).items()}
        result = {"machine": machine, "software": software, "settings": settings, "rows": rows}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
