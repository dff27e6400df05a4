"""Graphics processors as their makers describe them."""

from dataclasses import dataclass

from pacl_scale.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU; dense matrix products, without sparsity."""

    name: str
    half_tflops: float
    """Peak of bfloat16 and float16 products, 1e12 operations a second."""
    single_tflops: float
    """Peak of float32 products (without TF32)."""
    memory_gib: float
    memory_gb_per_s: float
    """Bandwidth of its memory, 1e9 bytes a second."""
    link_gb_per_s: float
    """Bandwidth to the other GPUs of a node, each direction."""

    def peak_flops(self, precision: str) -> float:
        """Operations a second in ``bf16``, ``fp16`` or ``fp32``."""
        return 1e12 * (self.single_tflops if precision == "fp32" else self.half_tflops)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("v100", 125.0, 15.7, 32, 900, 150),
        Gpu("a10g", 70.0, 35.0, 24, 600, 32),
        Gpu("l4", 121.0, 30.3, 24, 300, 32),
        Gpu("l40s", 362.0, 91.6, 48, 864, 32),
        Gpu("a100-40", 312.0, 19.5, 40, 1555, 300),
        Gpu("a100", 312.0, 19.5, 80, 2039, 300),
        Gpu("h100", 989.0, 67.0, 80, 3350, 450),
        Gpu("h200", 989.0, 67.0, 141, 4800, 450),
        Gpu("b200", 2250.0, 80.0, 180, 8000, 900),
        Gpu("mi300x", 1307.0, 163.4, 192, 5300, 448),
    )
}
"""By the name that ``--gpu`` takes. From the makers' data sheets; SXM (or OAM) variants where there are several."""

_DEVICE_NAMES = (
    ("V100", "v100"),
    ("A10G", "a10g"),
    ("L40S", "l40s"),
    ("L4", "l4"),
    ("A100-SXM4-40GB", "a100-40"),
    ("A100-PCIE-40GB", "a100-40"),
    ("A100", "a100"),
    ("H100", "h100"),
    ("H200", "h200"),
    ("B200", "b200"),
    ("MI300X", "mi300x"),
)
"""A part of what the driver calls a device, and its name here; the first that fits counts."""


def gpu_named(name: str) -> Gpu:
    """The GPU that ``--gpu`` means; :class:`UserError` for one that is not in the table."""
    try:
        return GPUS[name.lower()]
    except KeyError as error:
        raise UserError(f"gpu: there are no figures for {name!r}; choose among {', '.join(GPUS)}") from error


def gpu_of_device(device_name: str) -> Gpu | None:
    """The GPU that the driver calls ``device_name``; None for one that is not in the table."""
    return next((GPUS[name] for part, name in _DEVICE_NAMES if part in device_name), None)
