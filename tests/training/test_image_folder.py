"""open_folder: layouts, colours, and the sentence for each kind of broken folder."""

import numpy as np
import pytest
from PIL import Image

from vqkernels.training.errors import UserError
from vqkernels.training.image_folder import open_folder
from vqkernels.training.images import Splits


def read_folder(root, color="auto"):
    """Everything that the folder holds, decoded."""
    train, test, class_names = open_folder(root, color)
    return Splits(train.read(0, len(train)), None if test is None else test.read(0, len(test)), class_names)


def write(path, mode="L", size=(6, 4), value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if value is not None else 0).save(path)
    return path


def test_images_without_classes(tmp_path):
    write(tmp_path / "b.png", value=2)
    write(tmp_path / "a.png", value=1)
    write(tmp_path / ".hidden.png", value=9)
    (tmp_path / "notes.txt").write_text("no image")
    folder = read_folder(tmp_path)
    assert folder.train.pixels.shape == (2, 1, 4, 6) and folder.train.pixels[:, 0, 0, 0].tolist() == [1, 2]
    assert folder.train.labels is None and folder.test is None and folder.class_names == ()


def test_sub_folders_are_classes_and_numbers_sort_by_value(tmp_path):
    for number, name in enumerate(("10", "2", "cat")):
        write(tmp_path / name / "deeper" / "x.png", value=number)
    folder = read_folder(tmp_path)
    assert folder.class_names == ("2", "10", "cat")
    assert sorted(zip(folder.train.labels.tolist(), folder.train.pixels[:, 0, 0, 0].tolist(), strict=True)) == [
        (0, 1),
        (1, 0),
        (2, 2),
    ]


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_split_folders(tmp_path, test_name):
    for split, value in (("train", 1), (test_name, 2)):
        for name in ("cat", "dog"):
            write(tmp_path / split / name / "x.png", value=value)
    folder = read_folder(tmp_path)
    assert folder.class_names == ("cat", "dog")
    assert folder.train.pixels.unique().tolist() == [1] and folder.train.labels.tolist() == [0, 1]
    assert folder.test.pixels.unique().tolist() == [2] and folder.test.labels.tolist() == [0, 1]


def test_split_folders_without_classes(tmp_path):
    write(tmp_path / "train" / "x.png")
    write(tmp_path / "test" / "x.png")
    folder = read_folder(tmp_path)
    assert (len(folder.train.pixels), len(folder.test.pixels), folder.class_names) == (1, 1, ())


def test_train_beside_other_classes_is_a_class(tmp_path):
    for name in ("bus", "train"):
        write(tmp_path / name / "x.png")
    folder = read_folder(tmp_path)
    assert folder.class_names == ("bus", "train") and folder.test is None


@pytest.mark.parametrize(
    "mode,value,color,expected",
    [
        ("1", 1, "auto", [255]),
        ("L", 7, "auto", [7]),
        ("L", 7, "rgb", [7, 7, 7]),
        ("I;16", 7 * 256 + 3, "auto", [7]),
        ("RGB", (7, 7, 7), "grey", [7]),
        ("RGB", (1, 2, 3), "auto", [1, 2, 3]),
        ("RGBA", (1, 2, 3, 255), "auto", [1, 2, 3]),
        ("RGBA", (1, 2, 3, 0), "auto", [255, 255, 255]),
        ("RGBA", (1, 2, 3, 4), "rgba", [1, 2, 3, 4]),
        ("LA", (9, 0), "auto", [255]),
    ],
)
def test_colours(tmp_path, mode, value, color, expected):
    write(tmp_path / "x.png", mode, value=value)
    assert read_folder(tmp_path, color).train.pixels[0, :, 0, 0].tolist() == expected


def test_grey_among_rgb_becomes_rgb(tmp_path):
    write(tmp_path / "a.png", "L", value=5)
    write(tmp_path / "b.png", "RGB", value=(1, 2, 3))
    assert read_folder(tmp_path).train.pixels[:, :, 0, 0].tolist() == [[5, 5, 5], [1, 2, 3]]


def test_exif_orientation_is_followed(tmp_path):
    image = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "x.png", exif=exif)
    assert read_folder(tmp_path).train.pixels.shape == (1, 1, 3, 2)


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "class").mkdir()
    with pytest.raises(UserError, match=f"the folder {tmp_path} holds no images"):
        read_folder(tmp_path)


def test_mixed_sizes_name_two_files_and_their_sizes(tmp_path):
    first, second = write(tmp_path / "a.png"), write(tmp_path / "b.png", size=(5, 4))
    with pytest.raises(UserError, match=f"{first} is 6x4, but {second} is 5x4"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "suffix,kept", [(suffix, kept) for suffix in ("jpg", "png", "gif") for kept in (0.0, 0.5, 0.8)] + [("png", 0.999)]
)
def test_a_truncated_image_is_named(tmp_path, suffix, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"a.{suffix}")
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    broken = tmp_path / f"b.{suffix}"
    broken.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=f"the image {broken} cannot be read"):
        read_folder(tmp_path)


def test_images_beside_class_folders_are_named(tmp_path):
    inside, beside = write(tmp_path / "a.png"), write(tmp_path / "cat" / "b.png")
    with pytest.raises(UserError, match=f"such as {inside} and {beside}"):
        read_folder(tmp_path)


def test_a_class_of_the_test_split_alone_is_named(tmp_path):
    write(tmp_path / "train" / "cat" / "x.png")
    write(tmp_path / "test" / "dog" / "x.png")
    with pytest.raises(UserError, match="holds the class dog, but"):
        read_folder(tmp_path)
    write(tmp_path / "train" / "dog" / "x.png")
    assert read_folder(tmp_path).test.labels.tolist() == [1]
