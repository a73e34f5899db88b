"""Fixtures of the converter tests."""

import pytest

from converter.adapter_dir import AstraAdapter
from tests.converter.handmade import make_adapter, make_layer


@pytest.fixture
def adapter() -> AstraAdapter:
    return make_adapter(
        {"model.layers.0.q_proj": make_layer(24, 16, 4, 0.1), "model.layers.1.q_proj": make_layer(16, 24, 4, 0.1, 1)}
    )
