"""Did you mean …?"""

import pytest

from trainer.config.names import nearest


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("adamv", ["adamw", "sgd"], "adamw"),
        ("ResNet-18", ["resnet18", "resnet50"], "resnet18"),
        ("lr", ["optimizer.lr", "optimizer.eps"], "optimizer.lr"),
        ("quux", ["adamw", "sgd"], None),
        ("adamw", [], None),
    ],
)
def test_nearest(word, known, expected):
    assert nearest(word, known) == expected
