"""The choice among PyTorch's CUDA kernels, and each reason against one of them, by its message.

Tensors are on a CPU that claims to be a device of some compute capability; nothing is computed.
"""

import importlib.metadata
import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from ring_hf.kernels import FAMILIES, KERNELS, candidates, choose, cuda_cudnn, cuda_flash, flash_varlen, selection

CUDA = ("cuda_cudnn", "cuda_flash", "cuda_efficient")
CUDNN, EFFICIENT, NOT_EFFICIENT = CUDA[:1], CUDA[2:], CUDA[:2]


@pytest.fixture
def device(monkeypatch):
    """A Hopper with cuDNN 9.20 and PyTorch 2.13. A call changes the device until the end of the test."""

    def change(capability=(9, 0), activated=None, cudnn=92000, pytorch=(2, 13), flash_attn_4=None):
        selection.clear_cache()
        monkeypatch.setattr(flash_varlen, "DEVICE_TYPE", "cpu")
        monkeypatch.setattr(flash_varlen, "get_capability", lambda device: capability)
        monkeypatch.setattr(cuda_flash, "_is_built", lambda: True)
        monkeypatch.setattr(cuda_flash, "activated_implementation", lambda: activated)
        monkeypatch.setattr(cuda_cudnn, "_cudnn_version", lambda: cudnn)
        monkeypatch.setattr(cuda_cudnn, "_pytorch_version", lambda: pytorch)

        def version(name):
            if name == "flash-attn-4" and flash_attn_4:
                return flash_attn_4
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    change()
    yield change
    selection.clear_cache()


def _tensors(dims=(64, 64), dtype=torch.bfloat16, shape=(1, 1, 1)):
    return tuple(torch.empty(*shape, dim, dtype=dtype) for dim in dims)


@dataclass(frozen=True)
class Refusal:
    """Kernels that refuse tensors (arguments of `_tensors`) on a device (arguments of the fixture), and the reason."""

    kernels: tuple[str, ...]
    message: str
    device: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)


# Device, tensors -> the first kernel of the family that supports them.
CHOICES = {
    "hopper": ({}, {}, "cuda_cudnn"),
    "blackwell": ({"capability": (10, 3)}, {}, "cuda_cudnn"),
    "latent attention": ({}, {"dims": (192, 128)}, "cuda_cudnn"),
    "ampere": ({"capability": (8, 0)}, {}, "cuda_flash"),
    "consumer blackwell": ({"capability": (12, 0)}, {}, "cuda_flash"),
    "older cuDNN": ({"cudnn": 91002}, {}, "cuda_flash"),
    "wide heads": ({}, {"dims": (256, 256)}, "cuda_flash"),
    "FlashAttention-3": ({"activated": "FA3"}, {}, "cuda_flash"),
    "FlashAttention-4": ({"activated": "FA4", "flash_attn_4": "4.0.0b18"}, {}, "cuda_flash"),
    "FlashAttention-3 elsewhere": ({"activated": "FA3", "capability": (8, 0)}, {}, "cuda_efficient"),
    "fp32": ({}, {"dtype": torch.float32}, "cuda_efficient"),
    "wider heads": ({}, {"dims": (264, 264)}, "cuda_efficient"),
    "turing": ({"capability": (7, 5)}, {"dtype": torch.float16}, "cuda_efficient"),
    "no backward in flash": ({"capability": (8, 6)}, {"dims": (200, 200)}, "cuda_efficient"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_the_family_cuda_is_its_first_kernel_that_fits(name, device):
    device_changes, tensor_changes, expected = CHOICES[name]
    device(**device_changes)
    q, v = _tensors(**tensor_changes)
    assert FAMILIES["cuda"] == tuple(candidates("cuda", q, v)) == CUDA
    assert choose("cuda", q, v) is KERNELS[expected]


REFUSALS = {
    "no device": Refusal(CUDA, "PyTorch finds no CUDA device", {"capability": None}),
    "old for flash": Refusal(NOT_EFFICIENT, "compute capability 7.5 is below 8.0", {"capability": (7, 5)}),
    "fp64 for flash": Refusal(
        NOT_EFFICIENT, "dtype torch.float64 is not one of torch.float16", tensors={"dtype": torch.float64}
    ),
    "fp64": Refusal(EFFICIENT, "dtype torch.float64 is not one of torch.float32", tensors={"dtype": torch.float64}),
    "old": Refusal(EFFICIENT, "compute capability 3.5 is not between 5.0 and 12.1", {"capability": (3, 5)}),
    "unknown": Refusal(EFFICIENT, "compute capability 13.0 is not between 5.0 and 12.1", {"capability": (13, 0)}),
    "bf16": Refusal(
        EFFICIENT, "takes torch.bfloat16 from compute capability 8.0 on, not on 7.5", {"capability": (7, 5)}
    ),
    "no backward": Refusal(
        NOT_EFFICIENT, "no backward for head dim 200 on .* 8.9", {"capability": (8, 9)}, {"dims": (200, 64)}
    ),
    "capability": Refusal(CUDNN, r"compute capability 8.0 is not one of 9.0, 10.0, 10.3", {"capability": (8, 0)}),
    "head dims": Refusal(
        CUDNN, r"head dims \(136, 64\) are above 128 and not \(192, 128\)", tensors={"dims": (130, 64)}
    ),
    "latent": Refusal(
        CUDNN, r"head dims \(192, 192\) are above 128 and not \(192, 128\)", tensors={"dims": (192, 192)}
    ),
    "rows": Refusal(CUDNN, "65536 rows or heads are more than 65535", tensors={"shape": (65536, 1, 1)}),
    "heads": Refusal(CUDNN, "70000 rows or heads are more than 65535", tensors={"shape": (1, 70000, 1)}),
    "PyTorch": Refusal(
        CUDNN, "PyTorch 2.10 is older than 2.11, the first with a cuDNN that is new enough", {"pytorch": (2, 10)}
    ),
    "no cuDNN": Refusal(CUDNN, "this build of PyTorch has no cuDNN", {"cudnn": None}),
    "cuDNN": Refusal(CUDNN, r"cuDNN 91500 is older than 91501 \(9.15.1\)", {"cudnn": 91500}),
    "FA3 instead": Refusal(
        CUDNN, "FA3 was activated in PyTorch, which kernel='cuda_flash' runs", {"activated": "FA3"}
    ),
    "FA3 on Ampere": Refusal(
        NOT_EFFICIENT, "FA3 .* capability 9.x, not 8.0; .*undo", {"activated": "FA3", "capability": (8, 0)}
    ),
    "FA3 on Blackwell": Refusal(
        NOT_EFFICIENT, "FA3 .* capability 9.x, not 10.0", {"activated": "FA3", "capability": (10, 0)}
    ),
    "FA4 on consumer Blackwell": Refusal(
        NOT_EFFICIENT, "FA4 .* 9.x and 10.x, not 12.0", {"activated": "FA4", "capability": (12, 0)}
    ),
    "FA4 wide": Refusal(
        NOT_EFFICIENT,
        "FA4 was activated in PyTorch but takes head dims up to 128 on this device, not 192",
        {"activated": "FA4", "capability": (10, 0)},
        {"dims": (192, 128)},
    ),
    "FA4 new": Refusal(
        NOT_EFFICIENT,
        "flash-attn-4 4.0.0b19 returns more results than PyTorch unpacks; install a version before 4.0.0b19",
        {"activated": "FA4", "flash_attn_4": "4.0.0b19"},
    ),
    "FA4 final": Refusal(
        NOT_EFFICIENT, "flash-attn-4 4.0.0 returns more", {"activated": "FA4", "flash_attn_4": "4.0.0"}
    ),
    "FA5": Refusal(
        NOT_EFFICIENT, "FA5, which was activated in PyTorch, is not known here: FA3, FA4 are", {"activated": "FA5"}
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_unsupported_calls_are_refused_by_their_reason(name, device):
    refusal = REFUSALS[name]
    device(**refusal.device)
    for kernel in refusal.kernels:
        with pytest.raises(ValueError, match=refusal.message):
            choose(kernel, *_tensors(**refusal.tensors))
    assert {CUDA, CUDNN, EFFICIENT, NOT_EFFICIENT} == {refusal.kernels for refusal in REFUSALS.values()}


@pytest.mark.parametrize("kernel", CUDA)
def test_every_kernel_refuses_soft_capping_rocm_and_the_cpu(kernel, device, monkeypatch):
    tensors = _tensors()
    with pytest.raises(ValueError, match=r"it has no soft-capping \(softcap=2.0\)"):
        choose(kernel, *tensors, 2.0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="the device is driven by ROCm, whose kernels differ"):
        choose(kernel, *tensors)
    monkeypatch.setattr(flash_varlen, "DEVICE_TYPE", "cuda")
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        choose(kernel, *tensors)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_exclude_other_kernels(device, deterministic):
    message = r"not deterministic, which torch.use_deterministic_algorithms\(True\) requires"
    with pytest.raises(ValueError, match=message):
        choose("cuda_cudnn", *_tensors())
    assert choose("cuda", *_tensors()) is KERNELS["cuda_flash"]
    device(activated="FA3")
    assert choose("cuda", *_tensors()) is KERNELS["cuda_flash"]
    with pytest.raises(ValueError, match="FA3 was activated in PyTorch but is not deterministic for head dim 256"):
        choose("cuda_flash", *_tensors((256, 256)))


def test_settings_of_users_that_exclude_cudnn_are_respected(device, monkeypatch):
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with pytest.raises(ValueError, match=r"disabled by torch.backends.cuda.enable_cudnn_sdp\(False\)"):
            choose("cuda_cudnn", *_tensors())
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    with pytest.raises(ValueError, match="TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 gives lse another layout"):
        choose("cuda_cudnn", *_tensors())


def test_the_log_names_the_activated_implementation_once(device, caplog):
    caplog.set_level(logging.INFO, logger="ring_hf")
    cuda_flash._log_implementation.cache_clear()
    device(activated="FA3")
    for _ in range(2):
        choose("cuda_flash", *_tensors())
    assert [record.message for record in caplog.records] == [
        "kernel cuda_flash runs FA3, which was activated in PyTorch"
    ]
    cuda_flash._log_implementation.cache_clear()


@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "list_flash_attention_impls"), reason="this torch has one implementation of flash"
)
def test_the_activated_implementation_is_that_of_pytorch(monkeypatch):
    assert cuda_flash.activated_implementation() is None
    registry = torch.nn.attention._registry
    monkeypatch.setattr(registry, "_FLASH_ATTENTION_ACTIVE", ("FA4", object()))
    assert cuda_flash.activated_implementation() == "FA4"
    monkeypatch.delattr(torch.nn.attention, "current_flash_attention_impl")  # as in older PyTorch
    assert cuda_flash.activated_implementation() is None


@pytest.mark.skipif(
    not hasattr(torch.nn.attention, "list_flash_attention_impls"), reason="this torch has one implementation of flash"
)
def test_the_implementations_known_here_are_those_pytorch_lists():
    assert torch.nn.attention.list_flash_attention_impls() == list(cuda_flash.LIMITS)


def test_versions_are_read_from_pytorch():
    assert cuda_cudnn._pytorch_version() >= (2, 6)
    assert cuda_cudnn._cudnn_version() is None or cuda_cudnn._cudnn_version() > 80000
