"""Batches of images of equal shape for inference."""

import queue
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.data.images import read_rgb
from pipeline.data.index import Image
from pipeline.data.loading import normalise
from pipeline.errors import PipelineError
from pipeline.inference import batching
from pipeline.inference.batching import batches, pixels_per_batch
from tests.test_inference import CPU, smooth_images


@pytest.fixture
def images(tmp_path: Path) -> list[Image]:
    return smooth_images(tmp_path)


class TestBatches:
    def test_images_of_a_shape_go_together(self, images: list[Image]) -> None:
        found = list(batches(images, lambda image: (image.height, image.width), 10**6))
        assert [[image.id for image in part] for part, _ in found] == [["image0", "image2"], ["image1"], ["image3"]]
        assert [tuple(inputs.shape) for _, inputs in found] == [(2, 3, 32, 48), (1, 3, 48, 32), (1, 3, 30, 50)]
        for part, inputs in found:
            for image, one in zip(part, inputs, strict=True):
                assert torch.equal(one, normalise(read_rgb(image)))

    def test_several_threads_read_the_same(self, images: list[Image], monkeypatch: pytest.MonkeyPatch) -> None:
        one = list(batches(images, lambda image: (20, 20), 3 * 400))
        together = threading.Barrier(3)

        def met(image: Image) -> NDArray[np.uint8]:
            if image.id != "image3":  # the batch of three is read by three threads at a time
                together.wait(timeout=60)
            return read_rgb(image)

        monkeypatch.setattr(batching, "read_rgb", met)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        three = list(batches(images, lambda image: (20, 20), 3 * 400))
        assert [part for part, _ in three] == [part for part, _ in one]
        assert all(torch.equal(ours, inputs) for (_, ours), (_, inputs) in zip(three, one, strict=True))

    def test_a_batch_holds_at_most_so_many_pixels(self, images: list[Image]) -> None:
        square = [len(part) for part, _ in batches(images, lambda image: (20, 20), 3 * 400)]
        assert square == [3, 1]
        assert [len(part) for part, _ in batches(images, lambda image: (20, 20), 10)] == [1, 1, 1, 1]

    def test_the_next_batch_is_read_meanwhile_and_its_fault_comes_in_its_turn(
        self, images: list[Image], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: queue.Queue[str] = queue.Queue()

        def recorded(image: Image) -> NDArray[np.uint8]:
            read.put(image.id)
            if image.id == "image1":
                raise PipelineError("image1: changed")
            return read_rgb(image)

        monkeypatch.setattr(batching, "read_rgb", recorded)
        found = batches(images, lambda image: (20, 20), 10)
        assert [image.id for image in next(found)[0]] == ["image0"]
        assert [read.get(timeout=60) for _ in range(2)] == ["image0", "image1"]
        with pytest.raises(PipelineError, match="image1: changed"):
            next(found)

    def test_a_card_takes_more(self) -> None:
        assert pixels_per_batch(torch.device("cuda")) > pixels_per_batch(CPU) > 0
