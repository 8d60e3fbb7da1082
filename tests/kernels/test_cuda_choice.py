"""Which of PyTorch's CUDA kernels is chosen, and each reason why one is not, by its message.

Tensors are on a CPU that says it is a device of some compute capability; nothing is computed.
"""

import importlib.metadata
import logging

import pytest
import torch

from ring_hf.kernels import FAMILIES, KERNELS, candidates, choose, cuda_cudnn, cuda_flash, flash_varlen

CUDA = ("cuda_cudnn", "cuda_flash", "cuda_efficient")
HALF = torch.bfloat16


@pytest.fixture
def device(monkeypatch):
    """A Hopper with cuDNN 9.20 and PyTorch 2.13; what a test sets on it lasts as long as the test."""

    def change(capability=(9, 0), activated=None, cudnn=92000, pytorch=(2, 13), flash_attn_4=None):
        monkeypatch.setattr(flash_varlen, "DEVICE", "cpu")
        monkeypatch.setattr(flash_varlen, "capability", lambda device: capability)
        monkeypatch.setattr(cuda_flash, "_is_built", lambda: True)
        monkeypatch.setattr(cuda_flash, "activated", lambda: activated)
        monkeypatch.setattr(cuda_cudnn, "_cudnn", lambda: cudnn)
        monkeypatch.setattr(cuda_cudnn, "_pytorch", lambda: pytorch)

        def version(name):
            if name == "flash-attn-4" and flash_attn_4:
                return flash_attn_4
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    change()
    return change


def _tensors(dims=(64, 64), dtype=HALF, shape=(1, 1, 1)):
    return tuple(torch.empty(*shape, dim, dtype=dtype) for dim in dims)


FIRST = {
    "hopper": ({}, {}, "cuda_cudnn"),
    "blackwell": ({"capability": (10, 3)}, {}, "cuda_cudnn"),
    "latent attention": ({}, {"dims": (192, 128)}, "cuda_cudnn"),
    "ampere": ({"capability": (8, 0)}, {}, "cuda_flash"),
    "blackwell at home": ({"capability": (12, 0)}, {}, "cuda_flash"),
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


@pytest.mark.parametrize("name", FIRST)
def test_the_family_cuda_is_the_first_that_fits(name, device):
    has, wanted, expected = FIRST[name]
    device(**has)
    q, v = _tensors(**wanted)
    assert FAMILIES["cuda"] == tuple(candidates("cuda", q, v)) == CUDA
    assert choose("cuda", q, v) is KERNELS[expected]


UNFIT = {
    "elsewhere": (CUDA, {"capability": None}, {}, "PyTorch finds no CUDA device"),
    "old for flash": (CUDA[:2], {"capability": (7, 5)}, {}, "compute capability 7.5 is below 8.0"),
    "fp64 for flash": (CUDA[:2], {}, {"dtype": torch.float64}, "dtype torch.float64 is not one of torch.float16"),
    "fp64": (CUDA[2:], {}, {"dtype": torch.float64}, "dtype torch.float64 is not one of torch.float32"),
    "old": (CUDA[2:], {"capability": (3, 5)}, {}, "compute capability 3.5 is not between 5.0 and 12.1"),
    "unknown": (CUDA[2:], {"capability": (13, 0)}, {}, "compute capability 13.0 is not between 5.0 and 12.1"),
    "bf16": (CUDA[2:], {"capability": (7, 5)}, {}, "takes torch.bfloat16 from compute capability 8.0 on, not on 7.5"),
    "no backward": (CUDA[:2], {"capability": (8, 9)}, {"dims": (200, 64)}, "no backward for head dim 200 on .* 8.9"),
    "capability": (CUDA[:1], {"capability": (8, 0)}, {}, r"compute capability 8.0 is not one of 9.0, 10.0, 10.3"),
    "head dims": (CUDA[:1], {}, {"dims": (130, 64)}, r"head dims \(136, 64\) are above 128 and not \(192, 128\)"),
    "latent": (CUDA[:1], {}, {"dims": (192, 192)}, r"head dims \(192, 192\) are above 128 and not \(192, 128\)"),
    "rows": (CUDA[:1], {}, {"shape": (65536, 1, 1)}, "65536 rows or heads are more than 65535"),
    "heads": (CUDA[:1], {}, {"shape": (1, 70000, 1)}, "70000 rows or heads are more than 65535"),
    "PyTorch": (
        CUDA[:1],
        {"pytorch": (2, 10)},
        {},
        "PyTorch 2.10 is older than 2.11, the first with a cuDNN that is new enough",
    ),
    "no cuDNN": (CUDA[:1], {"cudnn": None}, {}, "this build of PyTorch has no cuDNN"),
    "cuDNN": (CUDA[:1], {"cudnn": 91500}, {}, r"cuDNN 91500 is older than 91501 \(9.15.1\)"),
    "FA3 instead": (
        CUDA[:1],
        {"activated": "FA3"},
        {},
        "FA3 was activated in PyTorch, which kernel='cuda_flash' runs",
    ),
    "FA3 on Ampere": (
        CUDA[:2],
        {"activated": "FA3", "capability": (8, 0)},
        {},
        "FA3 .* capability 9.x, not 8.0; .*undo",
    ),
    "FA3 on Blackwell": (CUDA[:2], {"activated": "FA3", "capability": (10, 0)}, {}, "FA3 .* capability 9.x, not 10.0"),
    "FA4 at home": (CUDA[:2], {"activated": "FA4", "capability": (12, 0)}, {}, "FA4 .* 9.x and 10.x, not 12.0"),
    "FA4 wide": (
        CUDA[:2],
        {"activated": "FA4", "capability": (10, 0)},
        {"dims": (192, 128)},
        "FA4 was activated in PyTorch but takes head dims up to 128 here, not 192",
    ),
    "FA4 new": (
        CUDA[:2],
        {"activated": "FA4", "flash_attn_4": "4.0.0b19"},
        {},
        "flash-attn-4 4.0.0b19 returns more than PyTorch unpacks; install one before 4.0.0b19",
    ),
    "FA4 final": (CUDA[:2], {"activated": "FA4", "flash_attn_4": "4.0.0"}, {}, "flash-attn-4 4.0.0 returns more"),
    "FA5": (
        CUDA[:2],
        {"activated": "FA5"},
        {},
        "FA5, which was activated in PyTorch, is not known here: FA3, FA4 are",
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_refused_by_its_reason(name, device):
    kernels, has, wanted, message = UNFIT[name]
    device(**has)
    for kernel in kernels:
        with pytest.raises(ValueError, match=message):
            choose(kernel, *_tensors(**wanted))
    assert {CUDA, CUDA[:1], CUDA[:2], CUDA[2:]} == {case[0] for case in UNFIT.values()}


@pytest.mark.parametrize("kernel", CUDA)
def test_every_kernel_asks_for_cuda_without_rocm_and_soft_capping(kernel, device, monkeypatch):
    tensors = _tensors()
    with pytest.raises(ValueError, match=r"it has no soft-capping \(softcap=2.0\)"):
        choose(kernel, *tensors, 2.0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ValueError, match="the device is driven by ROCm, whose kernels differ"):
        choose(kernel, *tensors)
    monkeypatch.setattr(flash_varlen, "DEVICE", "cuda")
    with pytest.raises(ValueError, match="the tensors are on cpu"):
        choose(kernel, *tensors)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms_leave_only_kernels_that_can(device, deterministic):
    with pytest.raises(ValueError, match=r"not deterministic, which torch.use_deterministic_algorithms\(True\) asks"):
        choose("cuda_cudnn", *_tensors())
    assert choose("cuda", *_tensors()) is KERNELS["cuda_flash"]
    device(activated="FA3")
    assert choose("cuda", *_tensors()) is KERNELS["cuda_flash"]
    with pytest.raises(ValueError, match="FA3 was activated in PyTorch but is not deterministic for head dim 256"):
        choose("cuda_flash", *_tensors((256, 256)))


def test_what_users_switch_off_stays_off(device, monkeypatch):
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with pytest.raises(ValueError, match=r"switched off by torch.backends.cuda.enable_cudnn_sdp\(False\)"):
            choose("cuda_cudnn", *_tensors())
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    with pytest.raises(ValueError, match="TORCH_CUDNN_SDPA_AVOID_RECOMPILE=1 gives lse another layout"):
        choose("cuda_cudnn", *_tensors())


def test_the_log_names_the_activated_implementation_once(device, caplog):
    caplog.set_level(logging.INFO, logger="ring_hf")
    cuda_flash._tell.cache_clear()
    device(activated="FA3")
    for _ in range(2):
        choose("cuda_flash", *_tensors())
    assert [record.message for record in caplog.records] == [
        "kernel cuda_flash runs FA3, which was activated in PyTorch"
    ]
    cuda_flash._tell.cache_clear()


def test_pytorch_says_what_was_activated(monkeypatch):
    assert cuda_flash.activated() is None
    registry = torch.nn.attention._registry
    monkeypatch.setattr(registry, "_FLASH_ATTENTION_ACTIVE", ("FA4", object()))
    assert cuda_flash.activated() == "FA4"
    monkeypatch.delattr(torch.nn.attention, "current_flash_attention_impl")  # PyTorch before it could be asked
    assert cuda_flash.activated() is None


def test_the_implementations_known_here_are_those_pytorch_lists():
    assert torch.nn.attention.list_flash_attention_impls() == list(cuda_flash.LIMITS)


def test_versions_are_read_from_pytorch():
    assert cuda_cudnn._pytorch() >= (2, 6) and (cuda_cudnn._cudnn() is None or cuda_cudnn._cudnn() > 80000)
