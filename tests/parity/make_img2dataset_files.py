"""Write tests/golden/img2dataset/ with img2dataset itself, from a server on this machine.

Twelve addresses of images and captions, of which three cannot be had, in each of three formats.

    pip install img2dataset==1.47.0 pillow
    python tests/parity/make_img2dataset_files.py
"""

import functools
import http.server
import json
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from img2dataset import download
from PIL import Image

GOLDEN = Path(__file__).parent.parent / "golden" / "img2dataset"
CAPTIONS = [
    "a red square", "un carré bleu, déjà vu", "zwei Zeilen\nin einer Bildunterschrift", "",
    "emoji 🦊 fox", 'quotes " and, commas', "日本語の説明", "x" * 300, "not found",
    "no image", "a gray image", "last one",
]  # fmt: skip


def write_images(folder: Path) -> None:
    for k in range(len(CAPTIONS)):
        size = (40 + 8 * k, 64 - 3 * k)
        image = Image.new("RGB", size, (20 * k, 255 - 20 * k, 90))
        image.paste((255, 255, 255), (5, 5, 15, 20))
        image.convert("L" if k == 10 else "RGB").save(folder / f"{k}.jpg", quality=80)
    (folder / "8.jpg").unlink()
    (folder / "9.jpg").write_bytes(b"<html>gone</html>")
    (folder / "3.jpg").write_bytes((folder / "3.jpg").read_bytes()[:200])


def main() -> None:
    shutil.rmtree(GOLDEN, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        images = Path(scratch) / "images"
        images.mkdir()
        write_images(images)
        handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(images))
        server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://localhost:{server.server_port}/{k}.jpg" for k in range(len(CAPTIONS))]
        scores = [k / 10 for k in range(len(CAPTIONS))]
        table = pa.table({"url": urls, "caption": CAPTIONS, "similarity": scores})
        pq.write_table(table, f"{scratch}/list.parquet")
        for output_format in ("webdataset", "parquet", "files"):
            download(
                url_list=f"{scratch}/list.parquet",
                input_format="parquet",
                url_col="url",
                caption_col="caption",
                save_additional_columns=["similarity"],
                output_folder=str(GOLDEN / output_format),
                output_format=output_format,
                processes_count=1,
                thread_count=1,
                number_sample_per_shard=7,
                image_size=32,
                resize_mode="keep_ratio",
                retries=0,
                enable_wandb=False,
            )
        server.shutdown()
    for stats in GOLDEN.rglob("*_stats.json"):
        print(stats.relative_to(GOLDEN), json.loads(stats.read_text())["status_dict"])


if __name__ == "__main__":
    sys.exit(main())
