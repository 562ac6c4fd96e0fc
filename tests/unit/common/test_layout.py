"""A model as one flat vector: every tensor once, in an order that is the model's own, and back without a loss."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from common.binding import Binding, layout_of
from common.errors import Code, PeerError, UsageError
from common.layout import DENSE_BYTES, DIMENSIONS, TENSORS, Layout, Tensor

LIMIT = 2**31


class Everything(nn.Module):
    """Tied weights, several dtypes, float and integer buffers, a frozen parameter, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 40)
        self.norm = nn.BatchNorm1d(40)
        self.half = nn.Linear(40, 40).to(torch.bfloat16)
        self.head = nn.Linear(40, 50, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(40, 40), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(9), persistent=False)
        self.register_buffer("scale", torch.full((2, 2), 3.0, dtype=torch.float64))


@pytest.fixture
def model() -> Everything:
    torch.manual_seed(1)
    return Everything()


def test_every_tensor_is_there_once(model: Everything) -> None:
    layout = layout_of(model)
    by_name = {tensor.name: tensor for tensor in layout.tensors}
    assert len(by_name) == len(layout.tensors)
    assert by_name["embedding.weight"].aliases == ("head.weight",)
    assert "head.weight" not in by_name
    assert "scratch" not in by_name
    assert by_name["frozen"].kind == "parameter"
    assert by_name["norm.num_batches_tracked"].kind == "local"
    assert by_name["scale"] == Tensor("scale", (2, 2), "float64", "buffer")
    assert by_name["half.weight"].dtype == "bfloat16"
    assert layout.parameters == sum(p.numel() for p in model.parameters())
    assert layout.buffers == 40 + 40 + 4
    assert layout.elements == layout.parameters + layout.buffers


def test_body_comes_first_then_dense_then_buffers(model: Everything) -> None:
    layout = layout_of(model)
    groups = [("local", "buffer", "dense", "body").index(group(tensor)) for tensor in layout.tensors]
    assert groups == sorted(groups, reverse=True)
    assert layout.body == sum(t.elements for t in layout.tensors if group(t) == "body")
    names = [name for name, _ in model.named_parameters()]
    for kind in ("body", "dense"):
        mine = [t.name for t in layout.tensors if group(t) == kind]
        assert mine == [name for name in names if name in mine], "the model's own order"


def group(tensor: Tensor) -> str:
    if tensor.kind != "parameter":
        return tensor.kind
    small = len(tensor.shape) < 2 or 4 * np.prod(tensor.shape) < DENSE_BYTES
    return "dense" if small else "body"


@pytest.mark.parametrize("wrap", ["compile", "module", "both"])
def test_wrappers_leave_no_trace(model: Everything, wrap: str) -> None:
    plain = layout_of(model)
    wrapped: Any = model
    if wrap in ("compile", "both"):
        wrapped = torch.compile(wrapped, backend="eager")
    if wrap in ("module", "both"):
        wrapped = nn.ModuleDict({"module": wrapped})  # the name that DistributedDataParallel gives
    assert layout_of(wrapped) == plain
    assert layout_of(wrapped).fingerprint == plain.fingerprint


def test_gather_and_scatter_are_inverse(model: Everything) -> None:
    layout = layout_of(model)
    binding = Binding(model, layout)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flat = np.full(layout.elements, np.nan, np.float32)
    binding.gather(flat)
    assert np.isfinite(flat).all(), "every element belongs to a tensor"
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.fill_(7.0)
        model.scratch.fill_(5.0)
        model.norm.num_batches_tracked.fill_(11)
    binding.scatter(flat)
    for name, tensor in model.state_dict().items():
        if name != "norm.num_batches_tracked":
            assert torch.equal(tensor, before[name]), name
    assert model.norm.num_batches_tracked.item() == 11, "local to the worker"
    assert torch.equal(model.scratch, torch.full((9,), 5.0)), "left out altogether"
    again = np.zeros_like(flat)
    binding.gather(again)
    assert again.tobytes() == flat.tobytes()
    assert model.head.weight.data_ptr() == model.embedding.weight.data_ptr(), "still tied"


def test_ranges_of_the_vector_are_those_of_the_layout(model: Everything) -> None:
    layout = layout_of(model)
    flat = np.arange(layout.elements, dtype=np.float32)
    Binding(model, layout).scatter(flat)
    start, state = 0, model.state_dict()
    for tensor in layout.tensors:
        if tensor.kind != "local":
            expected = torch.from_numpy(flat[start : start + tensor.elements]).view(tensor.shape)
            assert torch.equal(state[tensor.name], expected.to(state[tensor.name].dtype)), tensor
            start += tensor.elements
    assert start == layout.elements


def test_tensors_that_are_not_contiguous_are_bound_too() -> None:
    model = nn.Linear(30, 20)
    model.weight.data = torch.randn(30, 20).t()
    flat = np.zeros(620, np.float32)
    binding = Binding(model, layout_of(model))
    binding.gather(flat)
    assert torch.equal(torch.from_numpy(flat[:600]).view(20, 30), model.weight)
    binding.scatter(flat + 1)
    assert model.weight[3, 4].item() == flat[3 * 30 + 4] + 1


@pytest.mark.parametrize(
    "other",
    [torch.randn(20, 30), torch.randn(30, 20).t(), torch.randn(20, 30, dtype=torch.float64), torch.randn(700)[100:]],
    ids=["other memory", "transposed", "another type", "a part of more"],
)
def test_tensors_that_are_given_other_memory_are_followed(other: torch.Tensor) -> None:
    model = nn.Linear(30, 20)
    binding = Binding(model, layout_of(model))
    flat = np.zeros(620, np.float32)
    binding.gather(flat)
    model.weight.data = other.view(20, 30)
    binding.gather(flat)
    assert torch.equal(torch.from_numpy(flat[:600]).view(20, 30), other.view(20, 30).float())
    binding.scatter(flat + 1)
    assert torch.equal(model.weight.data.float(), torch.from_numpy(flat[:600] + 1).view(20, 30))
    model.weight.data = model.weight.data.t().contiguous().t()
    binding.scatter(flat)
    assert torch.equal(model.weight.data.float(), torch.from_numpy(flat[:600]).view(20, 30))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_travels_as_float32_without_a_further_loss(dtype: torch.dtype) -> None:
    model = nn.Linear(40, 40).to(dtype)
    layout = layout_of(model)
    binding = Binding(model, layout)
    assert not binding.exact
    assert Binding(nn.Linear(4, 4), layout_of(nn.Linear(4, 4))).exact
    flat, again = np.zeros(layout.elements, np.float32), np.zeros(layout.elements, np.float32)
    binding.gather(flat)
    binding.scatter(flat)
    binding.gather(again)
    assert again.tobytes() == flat.tobytes()


def test_models_that_cannot_be_trained_this_way_are_refused() -> None:
    with pytest.raises(UsageError, match="no parameters"):
        layout_of(nn.ReLU())
    whole = nn.Module()
    whole.count = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(UsageError, match="'count' int64"):
        layout_of(whole)
    whole.count = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(UsageError, match="complex64"):
        layout_of(whole)


def test_fingerprints_are_equal_exactly_for_models_that_fit() -> None:
    def model(width: int = 8, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width, bias=bias), nn.BatchNorm1d(width)).to(dtype)

    prints = [layout_of(m).fingerprint for m in (model(), model(9), model(bias=False), model(dtype=torch.float64))]
    assert len(set(prints)) == 4
    assert layout_of(model()).fingerprint == prints[0]


def test_difference_names_the_first_tensor() -> None:
    a = layout_of(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 30)))
    b = layout_of(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 31)))
    assert a.difference(a) == ""
    assert "'1.weight'" in a.difference(b)
    assert "[30, 40]" in a.difference(b)
    assert "[31, 40]" in a.difference(b)
    shorter, longer = Layout(a.tensors[:-1]), Layout((*a.tensors, Tensor("more", (3,), "float32", "parameter")))
    assert f"lacks {a.tensors[-1]}" in a.difference(shorter)
    assert "'more'" in a.difference(longer)
    assert "too many" in a.difference(longer)


# From a stranger


def test_parse_is_the_inverse_of_describe(model: Everything) -> None:
    layout = layout_of(model)
    for data in (layout.describe(), bytearray(layout.describe()), memoryview(layout.describe())):
        assert Layout.parse(data, elements_limit=LIMIT) == layout


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
tensors = st.builds(
    Tensor,
    names,
    st.lists(st.integers(0, 50), max_size=4).map(tuple),
    st.sampled_from(["float32", "float16", "bfloat16", "float64"]),
    st.sampled_from(["parameter", "buffer"]),
    st.lists(names, max_size=2).map(tuple),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(tensors, min_size=1, max_size=8, unique_by=lambda t: t.name))
def test_whatever_is_described_is_parsed(made: list[Tensor]) -> None:
    layout = Layout(tuple(sorted(made, key=lambda t: ["body", "dense", "buffer", "local"].index(group(t)))))
    if layout.parameters == 0:
        with pytest.raises(PeerError):
            Layout.parse(layout.describe(), elements_limit=LIMIT)
        return
    assert Layout.parse(layout.describe(), elements_limit=LIMIT) == layout


GOOD = ["w", [2, 3], "float32", "parameter", []]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        {},
        5,
        "text",
        None,
        [5],
        ["abcde"],
        [[]],
        [GOOD[:4]],
        [[*GOOD, 1]],
        [[5, *GOOD[1:]]],
        [["x" * 1025, *GOOD[1:]]],
        [["w", [-1, 3], *GOOD[2:]]],
        [["w", [True, 3], *GOOD[2:]]],
        [["w", [2.0, 3], *GOOD[2:]]],
        [["w", [2**40, 3], *GOOD[2:]]],
        [["w", [1] * (DIMENSIONS + 1), *GOOD[2:]]],
        [["w", "", *GOOD[2:]]],
        [["w", {}, *GOOD[2:]]],
        [["w", None, *GOOD[2:]]],
        [["w", [2, 3], "int64", "parameter", []]],
        [["w", [2, 3], "float128", "parameter", []]],
        [["w", [2, 3], "float32", "Parameter", []]],
        [["w", [2, 3], "float32", "buffer", []]],
        [["w", [0, 3], "float32", "parameter", []]],
        [["w", [2, 3], "float32", "parameter", "ab"]],
        [["w", [2, 3], "float32", "parameter", [5]]],
        [["b", [3], "float32", "buffer", []], GOOD],
        [["b", [3], "float32", "parameter", []], ["w", [64, 64], "float32", "parameter", []]],
        [GOOD, GOOD],
    ],
    ids=lambda rows: json.dumps(rows)[:40],
)
def test_nonsense_is_refused(rows: Any) -> None:
    with pytest.raises(PeerError):
        Layout.parse(json.dumps(rows).encode(), elements_limit=LIMIT)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[", b"[" * 100_000, b"9" * 5000, b'[["\xff",[1],"f","p",[]]]'])
def test_bytes_that_are_no_json_are_refused(data: bytes) -> None:
    with pytest.raises(PeerError) as caught:
        Layout.parse(data, elements_limit=LIMIT)
    assert caught.value.code == Code.MALFORMED


def test_limits() -> None:
    huge = [["w", [2**39] * 8, "float32", "parameter", []]]
    many = [["w", [1], "float32", "parameter", []]] * (TENSORS + 1)
    for rows in (huge, many, [["w", [11], "float32", "parameter", []]]):
        with pytest.raises(PeerError) as caught:
            Layout.parse(json.dumps(rows).encode(), elements_limit=10)
        assert caught.value.code == Code.LIMIT
